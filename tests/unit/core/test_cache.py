"""One new token at a time from the cache gives the logits of whole sequences, for rows of different lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megalm.config.schema import Model
from megalm.core.attention.cache import Decode, KeyValueCache, Prefill
from megalm.core.place import Place
from megalm.models.transformer import Transformer, build_full_model

WORDS, LENGTHS, STEPS = 61, (7, 3, 9), 12


def _model(**fields: Any) -> Transformer:
    model = Model(
        num_layers=3, hidden_size=32, num_heads=4, vocab_size=WORDS, sequence_length=40, init_std=0.3, **fields
    )
    return build_full_model(model, WORDS, seed=3).eval()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"position": "rotary", "num_kv_heads": 2, "norm": "rmsnorm"},
        {"attention_windows": (0, 5)},
        {"attention_windows": (3,), "num_kv_heads": 1},
        {"head_dim": 12, "num_kv_heads": 2, "position": "rotary", "qk_norm": True},
    ],
    ids=["learned", "rotary-grouped", "windows", "window-shorter-than-prompts", "head_dim"],
)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.bfloat16, 0.25)], ids=["fp32", "bf16"])
@torch.inference_mode()
def test_cached_steps_equal_whole_sequences(fields: dict[str, Any], dtype: torch.dtype, bound: float) -> None:
    model = _model(**fields).to(dtype)
    tokens = torch.randint(WORDS, (3, 30), generator=torch.Generator().manual_seed(1))
    cache, longest = KeyValueCache(3, 30), max(LENGTHS)
    model.through(0, tokens[:, :longest], None, Place(torch.arange(longest), memory=Prefill(cache, 0, LENGTHS)))
    positions = list(LENGTHS)
    for _ in range(STEPS):
        newest = torch.stack([tokens[row, at] for row, at in enumerate(positions)])[:, None]
        memory = Decode(cache, positions, torch.device("cpu"))
        place = Place(torch.tensor(positions)[:, None], memory=memory)
        logits = model.logits(model.through(0, newest, None, place))[:, 0]
        for row, at in enumerate(positions):
            whole = model(tokens[row : row + 1, : at + 1])[0, -1]
            assert (logits[row] - whole).abs().max() < bound
        positions = [at + 1 for at in positions]


@torch.inference_mode()
def test_a_window_bounds_what_is_kept_and_heads_are_kept_grouped() -> None:
    model = _model(attention_windows=(4,), num_kv_heads=1)
    cache = KeyValueCache(2, 32)
    place = Place(torch.arange(20), memory=Prefill(cache, 0, (20, 9)))
    model.through(0, torch.zeros(2, 20, dtype=torch.int64), None, place)
    keys_and_values, rows, kv_heads, places, head, layers, size = 2, 2, 1, 4, 8, 3, 4
    assert cache.nbytes == keys_and_values * rows * kv_heads * places * head * layers * size


@torch.inference_mode()
def test_rows_move_and_the_cache_grows() -> None:
    cache = KeyValueCache(2, 4)
    like = torch.zeros(1, 1, 1, 2)
    both = cache.layer(0, like, 0)
    both[:, 0], both[:, 1] = 1.0, 2.0
    cache.move([1, 0, 1])
    assert cache.layer(0, like, 0)[0, :, 0, 0, 0].tolist() == [2.0, 1.0, 2.0]
    cache.reserve(3, 6)
    grown = cache.layer(0, like, 0)
    assert grown.shape == (2, 3, 1, 6, 2)
    assert grown[0, 0, 0, :, 0].tolist() == [2.0] * 4 + [0.0] * 2
