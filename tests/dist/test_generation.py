"""Text generated on every layout is what the library generates: greedy and by beam search, with and without a cache."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_models import convert_quietly
from generation import answers_on_ranks
from harness import run_ranks

from megalm.data.tokenization.tokenizer import Tokenizer
from megalm.generate.requests import Asked, GenerateRequest, Sampling, ScoreRequest

transformers = pytest.importorskip("transformers")

END, VOCAB, NEW, BEAMS = 96, 97, 64, 3
LENGTHS = (5, 17, 3, 29, 11, 2, 40)
LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]
IDS = ["tp1", "tp2", "pp2", "tp2-pp2"]
GREEDY = Sampling(temperature=0.0)
_SPECIAL = {
    "bos_token_id": END,
    "eos_token_id": END,
    "pad_token_id": END,
    "vocab_size": VOCAB,
    "initializer_range": 0.3,
}
CONFIGS: dict[str, Any] = {
    "gpt2": lambda: transformers.GPT2Config(n_layer=3, n_embd=60, n_head=6, n_positions=128, **_SPECIAL),
    "neox": lambda: transformers.GPTNeoXConfig(
        num_hidden_layers=3,
        hidden_size=48,
        num_attention_heads=6,
        intermediate_size=100,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        **_SPECIAL,
    ),
    "llama": lambda: transformers.LlamaConfig(
        num_hidden_layers=3,
        hidden_size=48,
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=100,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        **_SPECIAL,
    ),
    "mistral": lambda: transformers.MistralConfig(
        num_hidden_layers=2,
        hidden_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=100,
        max_position_embeddings=128,
        sliding_window=7,
        tie_word_embeddings=False,
        **_SPECIAL,
    ),
}
"""Large initial weights, so that the likeliest token wins clearly; odd sizes; grouped heads; a window."""


def _tokenizer() -> Tokenizer:
    import tokenizers

    words = {f"w{number}": number for number in range(END)} | {"<|endoftext|>": END}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.add_special_tokens(["<|endoftext|>"])
    return Tokenizer(made.to_str())


def _library(model: Any, prompts: list[list[int]], *, beams: int, use_cache: bool) -> list[list[int]]:
    """New tokens of each prompt, left-padded in one batch, without what ends them."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), END)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    length_penalty = {"length_penalty": 0.7} if beams > 1 else {}
    made = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW,
        do_sample=False,
        num_beams=beams,
        use_cache=use_cache,
        **length_penalty,
    )
    rows = made[:, longest:].tolist()
    return [row[: row.index(END)] if END in row else row for row in rows]


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory):
    """By name: what the library has made of the prompts, and by layout what the ranks have."""
    folder = tmp_path_factory.mktemp("generation")
    torch.manual_seed(5)
    prompts = [torch.randint(END, (length,)).tolist() for length in LENGTHS]
    runs: dict[str, Path] = {}
    asked, expected = {}, {}
    for name, make in CONFIGS.items():
        model = transformers.AutoModelForCausalLM.from_config(make()).eval()
        model.save_pretrained(folder / name)
        _tokenizer().save(folder / name)
        convert_quietly("hf", "megalm", folder / name, folder / f"{name}-run", tp=2, pp=1)
        runs[name] = folder / f"{name}-run"
        greedy = [
            GenerateRequest(tokens=tuple(prompt), max_new_tokens=NEW, sampling=GREEDY, alternatives=2)
            for prompt in prompts
        ]
        beams = [replace(each, beams=BEAMS, length_penalty=0.7, alternatives=None) for each in greedy]
        drawn = [
            replace(each, sampling=Sampling(temperature=0.8, top_k=40, top_p=0.9, seed=3), samples=2, max_new_tokens=12)
            for each in greedy
        ]
        scored = [ScoreRequest(context=tuple(prompt[:1]), continuation=tuple(prompt[1:])) for prompt in prompts]
        asked[name] = [
            Asked(tuple(greedy), 16),
            Asked(tuple(replace(each, max_new_tokens=20) for each in greedy), 3),
            Asked(tuple(beams), BEAMS * len(LENGTHS)),
            Asked(tuple(drawn), 5),
            Asked(tuple(scored), 4),
        ]
        with torch.no_grad():
            logits = [model(torch.tensor([prompt])).logits[0].log_softmax(-1) for prompt in prompts]
        expected[name] = {
            "greedy": _library(model, prompts, beams=1, use_cache=True),
            "uncached": _library(model, prompts, beams=1, use_cache=False),
            "beams": _library(model, prompts, beams=BEAMS, use_cache=True),
            "scores": [
                values[torch.arange(len(prompt) - 1), torch.tensor(prompt[1:])]
                for values, prompt in zip(logits, prompts, strict=True)
            ],
        }

    @cache
    def found(ranks: int) -> list[Any]:
        layouts = [(tp, pp) for tp, pp in LAYOUTS if tp * pp <= ranks]
        return run_ranks(ranks, answers_on_ranks, runs, asked, layouts, timeout_seconds=240)[0]

    def of(layout: tuple[int, int], name: str) -> list[Any]:
        """On four ranks: replicas fill them."""
        return found(4)[LAYOUTS.index(layout)][name]

    return expected, of


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=IDS)
def test_every_layout_generates_what_the_library_does(layout, name: str, generated) -> None:
    expected, of = generated
    greedy, small_batches, beams, _, _ = of(layout, name)
    assert expected[name]["greedy"] == expected[name]["uncached"]
    assert len({len(tokens) for tokens in expected[name]["greedy"]}) > 1, "some end before others"
    assert [list(each[0].tokens) for each in greedy] == expected[name]["greedy"]
    assert [list(each[0].tokens) for each in small_batches] == [each[:20] for each in expected[name]["greedy"]]
    assert [list(each[0].tokens) for each in beams] == expected[name]["beams"]
    for each in greedy:
        for token, told in zip(each[0].tokens, each[0].probabilities, strict=True):
            assert told.alternatives[0][0] == token
            assert told.alternatives[0][1] == pytest.approx(told.log_probability, abs=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=IDS)
def test_log_probabilities_are_the_librarys(layout, name: str, generated) -> None:
    expected, of = generated
    scores = of(layout, name)[4]
    for score, values in zip(scores, expected[name]["scores"], strict=True):
        torch.testing.assert_close(torch.tensor(score.log_probabilities), values, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_draw_depends_on_prompt_and_seed_not_on_layout_or_batch(name: str, generated) -> None:
    _, of = generated
    texts = [[[sample.tokens for sample in each] for each in of(layout, name)[3]] for layout in LAYOUTS]
    assert all(other == texts[0] for other in texts[1:])
    assert all(first != second for first, second in texts[0]), "two samples of a prompt differ"
