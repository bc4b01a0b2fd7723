"""What a certificate lets pass, and what it says of what it does not."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from megalm.config.compose import compose
from megalm.launch.function_ranks import RankFailure
from megalm.verify.certificate import Certificate, Row
from megalm.verify.differences import Differences, differences
from megalm.verify.parity import Trace
from megalm.verify.shrink import Case, shrink

CONFIG = compose(["experiment=quickstart"])
SHRUNK = shrink(CONFIG, 4)
BF16 = SHRUNK.layout
FP32 = Case(replace(BF16.config, engine=replace(BF16.config.engine, dtype="fp32")), 1)
NEAR = Differences(loss=1e-7, grad_norm=1e-7, weights=1e-7, initial_weights=0.0, copies=0.0, missing=0, untrained=())


@pytest.mark.parametrize(
    ("case", "changes", "complaint"),
    [
        (FP32, {}, None),
        (FP32, {"loss": 2e-5}, "loss differs by 2.0e-05"),
        (FP32, {"grad_norm": 2e-5}, "gradient norm differs by 2.0e-05"),
        (FP32, {"weights": 2e-5}, "weights differs by 2.0e-05"),
        (FP32, {"loss": float("inf")}, "loss differs by inf"),
        (BF16, {"loss": 2e-5, "grad_norm": 4e-3, "weights": 0.1}, None),
        (BF16, {"loss": 6e-3}, "loss differs by 6.0e-03"),
        (BF16, {"initial_weights": 1e-9}, "initial weights differ by 1.0e-09, and should be the same bits"),
        (BF16, {"copies": 1e-9}, "copies on different ranks differ by 1.0e-09, and should be the same bits"),
        (BF16, {"untrained": ("a", "b", "c")}, "a and 2 more: not trained"),
        (BF16, {"missing": 1024}, "1,024 weights are on no rank"),
    ],
)
def test_what_passes(case: Case, changes: dict[str, Any], complaint: str | None) -> None:
    row = Row(case, replace(NEAR, **changes))
    assert row.complaints == ([] if complaint is None else [complaint])
    assert row.passed == (complaint is None)


def certificate(*rows: Row) -> Certificate:
    return Certificate(CONFIG, SHRUNK, {"bf16": 0.5}, {"bf16": [1.0, 0.4, 0.9]}, {"bf16": [4.0, 3.9, 3.8]}, rows)


def test_json_says_all_and_stays_json(tmp_path: Path) -> None:
    failed = Row(FP32, replace(NEAR, loss=float("inf")))
    broken = Row(BF16, RankFailure("rank 1: ValueError: no", "--- rank 1: error ---\nTraceback"))
    certificate(Row(BF16, NEAR), failed, broken).save(tmp_path / "new" / "certificate.json")
    saved = json.loads((tmp_path / "new" / "certificate.json").read_text())
    assert saved["passed"] is False
    assert [row["passed"] for row in saved["rows"]] == [True, False, False]
    assert saved["rows"][1]["differences"]["loss"] is None
    assert saved["rows"][2]["complaints"] == ["rank 1: ValueError: no"]
    assert "Traceback" in saved["rows"][2]["report"]
    assert saved["reference"]["bf16"]["clipped_steps"] == [1, 3]
    assert saved["versions"]["torch"] == torch.__version__
    assert saved["config"]["parallel"]["tp"] == 2 and saved["shrunk_config"]["model"]["vocab_size"] == 61
    other = certificate(Row(BF16, NEAR))
    changed = replace(other, config=replace(CONFIG, run=replace(CONFIG.run, seed=5)))
    assert saved["config_sha256"] == other.to_dict()["config_sha256"] != changed.to_dict()["config_sha256"]


def test_the_table_names_what_fails() -> None:
    text = io.StringIO()
    certificate(Row(BF16, NEAR), Row(FP32, replace(NEAR, weights=1.0))).print(Console(file=text, width=100))
    lines = text.getvalue().splitlines()
    assert any("tp2 pp2 1f1b" in line and "pass" in line for line in lines)
    assert any("tp2 pp2 1f1b" in line and line.strip().endswith("FAIL") for line in lines)
    assert lines[-1] == "FAIL tp2 pp2 1f1b (fp32): weights differs by 1.0e+00"
    assert "3 steps, 2 of them" not in text.getvalue() and "6 steps, 2 of them clipped" in text.getvalue()


NAN = float("nan")
WHOLE = torch.tensor([1.0, 2.0, 3.0])
BEFORE = torch.tensor([0.5, 2.5, 3.5])


def trace(weights: torch.Tensor, losses: list[float] | None = None, norms: list[float] | None = None) -> Trace:
    return Trace(losses or [2.0, 1.0], norms or [4.0, 3.0], {"w": BEFORE.where(~weights.isnan(), NAN)}, {"w": weights})


def test_differences_of_slices_that_make_up_the_whole() -> None:
    ranks = [trace(torch.tensor([1.0, 2.0, NAN])), trace(torch.tensor([NAN, 2.0, 3.0]))]
    assert differences(trace(WHOLE), ranks) == Differences(0, 0, 0, 0, 0, 0, ())


def test_differences_find_each_kind_of_fault() -> None:
    want = trace(WHOLE)
    hole = differences(want, [trace(torch.tensor([1.0, NAN, 3.0]))])
    assert (hole.missing, hole.weights) == (1, float("inf"))
    assert differences(want, [trace(BEFORE)]).untrained == ("w",)
    assert differences(trace(BEFORE), [trace(BEFORE)]).untrained == (), "the reference did not move either"
    copies = differences(want, [trace(WHOLE), trace(torch.tensor([NAN, 2.5, 3.0]))])
    assert (copies.copies, copies.weights) == (0.5, 0.5)
    assert differences(want, [trace(WHOLE, losses=[2.0, 1.25])]).loss == 0.25
    assert differences(want, [trace(WHOLE), trace(WHOLE, losses=[2.0, 1.25])]).copies == 0.25
    assert differences(want, [trace(WHOLE, norms=[5.0, 3.0])]).grad_norm == 0.25, "relative above 1"
    assert differences(want, [trace(WHOLE, losses=[NAN, 1.0])]).loss == float("inf")
    assert differences(want, [Trace([2.0, 1.0], [4.0, 3.0], {}, {})]).weights == float("inf")
