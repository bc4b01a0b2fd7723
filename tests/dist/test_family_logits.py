"""Converted models, loaded by the ranks of every layout, compute what the library computes with the original."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from family_logits import logits_on_ranks
from foreign_models import convert_quietly
from harness import run_ranks

from tests.library_models import ONE_OF_EACH, save, tokens

pytest.importorskip("transformers")

LAYOUTS = [(tp, pp) for tp in (1, 2, 4) for pp in (1, 2)]
NAMES = (*ONE_OF_EACH, "llama-attention_bias", "qwen3-windows", "qwen3-biases")
"""Two key/value heads each where they are grouped: at tp 4 two ranks share one."""


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory):
    """By name: the library's logits, and by layout those that the ranks of last stages computed."""
    folder = tmp_path_factory.mktemp("families")
    runs: dict[str, Path] = {}
    drawn, expected = {}, {}
    for name in NAMES:
        theirs = save(name, folder / name)
        convert_quietly("hf", "megalm", folder / name, folder / f"{name}-run", tp=2, pp=1)
        runs[name] = folder / f"{name}-run"
        drawn[name] = tokens(theirs.config.pad_token_id if "roberta" in name else None)
        with torch.no_grad():
            expected[name] = theirs(input_ids=drawn[name]).logits

    @cache
    def found() -> list[list[dict]]:
        return run_ranks(8, logits_on_ranks, runs, drawn, LAYOUTS, timeout_seconds=240)

    return expected, found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("index", range(len(LAYOUTS)), ids=[f"tp{tp}-pp{pp}" for tp, pp in LAYOUTS])
def test_every_layout_computes_the_librarys_logits(name: str, index: int, compared) -> None:
    expected, found = compared
    computed = [by_layout[index][name] for by_layout in found() if by_layout[index][name] is not None]
    assert len(computed) == 8 // LAYOUTS[index][1]
    for logits in computed:
        torch.testing.assert_close(logits, expected[name], rtol=0, atol=1e-4)
