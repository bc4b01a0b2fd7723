import pytest
import torch

from megalm.config.schema import Model
from megalm.errors import ConfigError
from megalm.generate.generation import generate_tokens
from megalm.generate.sampling import Sampling
from megalm.models.transformer import build_full_model

GREEDY = Sampling(temperature=0)


class Counting:
    """A model that continues n with n + 1, and remembers what it was shown."""

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size
        self.windows = []

    def __call__(self, tokens):
        self.windows.append(tokens[0].tolist())
        return torch.nn.functional.one_hot((tokens + 1) % self.vocab_size, self.vocab_size).float()


def test_the_prompt_is_continued_from_its_last_token():
    model = Counting(20)
    tokens = generate_tokens(model, [3, 4], sequence_length=8, max_new_tokens=4, sampling=GREEDY)
    assert tokens == [5, 6, 7, 8]


def test_the_window_slides_once_it_is_full():
    model = Counting(20)
    generate_tokens(model, [1, 2], sequence_length=3, max_new_tokens=3, sampling=GREEDY)
    assert model.windows == [[1, 2], [1, 2, 3], [2, 3, 4]]


def test_generation_ends_at_the_end_of_text():
    tokens = generate_tokens(Counting(20), [3], sequence_length=8, max_new_tokens=9, sampling=GREEDY, stop_ids={6})
    assert tokens == [4, 5]


def test_what_cannot_be_done_is_said():
    with pytest.raises(ConfigError, match="prompt"):
        generate_tokens(Counting(5), [], sequence_length=8, max_new_tokens=1, sampling=GREEDY)
    with pytest.raises(ConfigError, match="max_new_tokens=-1"):
        generate_tokens(Counting(5), [1], sequence_length=8, max_new_tokens=-1, sampling=GREEDY)


@pytest.mark.parametrize("position", ["learned", "rotary"])
def test_a_real_model_continues_past_its_sequence_length(position):
    model = build_full_model(
        Model(num_layers=2, hidden_size=32, num_heads=2, sequence_length=8, position=position), 50, seed=1
    )
    tokens = generate_tokens(model, [1, 2, 3], sequence_length=8, max_new_tokens=12, sampling=Sampling(seed=2))
    assert len(tokens) == 12
    assert all(0 <= token < 50 for token in tokens)
