"""What the fuzzer draws, and what it takes for a difference."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[3] / "tools"
DATASETS = {"plain": "data/a", "masked": "data/b"}


@pytest.fixture(scope="module")
def fuzz():
    sys.path.insert(0, str(TOOLS))
    try:
        import fuzz

        yield fuzz
    finally:
        sys.path.remove(str(TOOLS))


def test_a_seed_gives_one_case_whose_runs_the_rules_accept(fuzz) -> None:
    from fuzzing.draw import draw, is_accepted

    cases = [draw(seed, DATASETS, 4) for seed in range(40)]
    assert cases[:3] == [draw(seed, DATASETS, 4) for seed in range(3)]
    for case in cases:
        assert all(is_accepted({**case.base, **fields}) for fields in (case.reference, case.first, case.second))
        assert max(case.first["launch.ranks"], case.second["launch.ranks"]) <= 4
    layouts = [layout for case in cases for layout in (case.first, case.second)]
    assert {layout["engine.zero_stage"] for layout in layouts} == {0, 1, 2, 3}
    assert {layout["parallel.schedule"] for layout in layouts} == {"1f1b", "gpipe", "zb_h1", "interleaved_1f1b"}
    assert all(any(layout[f"parallel.{axis}"] > 1 for layout in layouts) for axis in ("tp", "pp", "cp"))


def test_the_command_line_gives_the_config_that_was_drawn(fuzz) -> None:
    from fuzzing.draw import config_of, draw, overrides_of

    from megalm.config.compose import compose

    case = draw(1, DATASETS, 4)
    fields = {"run.name": "cut", **case.base, **case.first}
    assert compose(overrides_of(fields)) == config_of(fields)
    assert all(line.split(": ", 1)[1].startswith(("megalm train ", "python ")) for line in fuzz.command_lines(case))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({}, None),
        ({"loss": 2.0 + 2e-5}, "loss"),
        ({"loss": math.nan}, "loss"),
        ({"grad_norm": 0.5 * (1 + 2e-4)}, "grad_norm"),
        ({"loss_tokens": 7}, "loss_tokens"),
        ({"lr": 2e-4}, "lr"),
    ],
)
def test_what_is_further_than_the_bounds_is_told(
    fuzz, tmp_path: Path, change: dict[str, float], word: str | None
) -> None:
    from fuzzing.draw import STEPS, draw

    case = next(case for case in (draw(seed, DATASETS, 4) for seed in range(50)) if case.base["engine.dtype"] == "fp32")
    row = {"loss": 2.0, "grad_norm": 0.5, "loss_tokens": 8, "samples": 4, "tokens": 64, "lr": 1e-4}
    validation = {"step": STEPS, "samples": 4, "tokens": 64, "val_loss": 2.0, "val_tokens": 9}
    for name, last in (("mine", change), ("theirs", {})):
        (tmp_path / name).mkdir()
        rows = [{"step": step, **row, **(last if step == STEPS else {})} for step in range(1, STEPS + 1)]
        text = "".join(json.dumps(each).replace("NaN", '"NaN"') + "\n" for each in [*rows, validation])
        (tmp_path / name / "metrics.jsonl").write_text(text)
    found = fuzz.difference(case, tmp_path / "mine", tmp_path / "theirs")
    assert found is None if word is None else f"step {STEPS}: {word} " in found
