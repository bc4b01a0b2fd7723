import math

import pytest
import torch

from megalm.errors import ConfigError
from megalm.generate.sampling import Sampling, next_token


def draws(logits, sampling, count):
    generator = sampling.generator()
    return [next_token(logits, sampling, generator) for _ in range(count)]


def test_greedy_takes_the_likeliest():
    assert draws(torch.tensor([0.0, 3.0, 2.9]), Sampling(temperature=0), 5) == [1] * 5


def test_a_seed_is_a_sequence_of_draws():
    logits = torch.zeros(50)
    first = draws(logits, Sampling(seed=3), 20)
    assert draws(logits, Sampling(seed=3), 20) == first
    assert draws(logits, Sampling(seed=4), 20) != first


def test_the_global_random_state_is_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    draws(torch.zeros(50), Sampling(seed=3), 20)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_softmax(temperature):
    logits = torch.tensor([0.0, 1.0, 2.0])
    drawn = torch.tensor(draws(logits, Sampling(temperature=temperature), 4000))
    frequencies = torch.bincount(drawn, minlength=3) / 4000
    assert torch.allclose(frequencies, torch.softmax(logits / temperature, -1), atol=0.03)


def test_top_k_draws_only_the_k_likeliest():
    logits = torch.arange(10.0)
    assert set(draws(logits, Sampling(temperature=5.0, top_k=3), 300)) == {7, 8, 9}
    assert set(draws(logits, Sampling(temperature=50.0, top_k=99), 600)) == set(range(10))


def test_excluded_tokens_are_never_drawn_and_tiny_temperatures_do_not_overflow():
    logits = torch.tensor([-math.inf, 60000.0, 59999.0, -math.inf])
    assert set(draws(logits, Sampling(), 200)) == {1, 2}
    assert set(draws(logits, Sampling(temperature=1e-30), 50)) == {1}


def test_values_that_make_no_sense_are_all_named():
    with pytest.raises(ConfigError) as caught:
        Sampling(temperature=-1, top_k=-5)
    assert len(caught.value.lines) == 2
    with pytest.raises(ConfigError):
        Sampling(temperature=math.nan)
