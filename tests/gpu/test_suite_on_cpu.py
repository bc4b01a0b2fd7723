"""The suite for a first GPU, tried on the CPU: every kind of part runs, a budget is kept, failures are failures."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

RUN = Path(__file__).with_name("run.py")


@pytest.fixture(scope="module")
def suite():
    before = list(sys.path)
    sys.path.insert(0, str(RUN.parent))
    try:
        from suite import budget, cases

        yield budget, cases
    finally:
        sys.path[:] = before


def run(*arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, str(RUN), "--device", "cpu", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_each_kind_of_part_passes_and_one_table_is_printed(tmp_path: Path) -> None:
    parts = ["llama bf16", "run: save", "run: gen", "speed: toy eager", "ranks: tp2, sequence"]
    code, output = run("--only", *parts, "--json", str(tmp_path / "found.json"))
    assert code == 0, output
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["parts"]) >= len(parts)
    assert {part["outcome"] for part in found["parts"]} == {"passed"}, output
    (speed,) = found["speed"]
    assert sum(speed["shares"].values()) == pytest.approx(1.0)
    assert min(speed["shares"][part] for part in ("matmul", "memory-bound", "optimizer")) > 0.0
    assert "MFU %" in output
    assert "toy, micro-batch 4, eager" in output


def test_the_parts_fit_a_gpus_budget_and_have_names_of_their_own() -> None:
    done = subprocess.run([sys.executable, str(RUN), "--list"], capture_output=True, text=True, check=True)
    names = [line.split(" s  ")[1] for line in done.stdout.splitlines()]
    assert len(set(names)) == len(names)
    for asked in ("fp32", "bf16", "fp16", "compiled", "documents", "offload", "zero 1", "zero 2", "zero 3"):
        assert asked in names
    for asked in ("gpt3_125m eager", "gpt3_125m compiled", "gpt3_1_3b eager", "gpt3_1_3b compiled"):
        assert f"speed: {asked}" in names
    for asked in ("tp2", "pp2", "dp2", "cp2"):
        assert any(name.startswith(f"ranks: {asked}") for name in names)


def test_what_does_not_fit_is_skipped_and_what_fails_is_told(suite) -> None:
    budget, _ = suite
    now = [0.0]

    def takes(seconds: float) -> str:
        now[0] += seconds
        return "found"

    def fails() -> str:
        raise ValueError("wrong")

    def cannot() -> str:
        raise budget.SkippedError("one GPU, two are needed")

    shown = io.StringIO()
    parts = [
        budget.Part("first", 60, lambda: takes(50)),
        budget.Part("too long", 60, lambda: takes(1)),
        budget.Part("broken", 10, fails),
        budget.Part("lacking", 10, cannot),
        budget.Part("short", 40, lambda: takes(40)),
    ]
    results = budget.run_parts(parts, 100.0, shown, clock=lambda: now[0])
    assert [result.outcome for result in results] == ["passed", "skipped", "FAILED", "skipped", "passed"]
    assert "50 s are left, it may take 60" in results[1].detail
    assert "ValueError: wrong" in results[2].detail
    assert results[3].detail == "one GPU, two are needed"
    assert shown.getvalue().count("\n") >= 5


def test_a_part_that_hangs_is_ended(suite) -> None:
    budget, _ = suite
    (result,) = budget.run_parts([budget.Part("hangs", 0.05, lambda: time.sleep(30))], 10.0, io.StringIO())
    assert result.outcome == "FAILED"
    assert "TimeoutError" in result.detail
    assert result.seconds < 10


def test_every_case_is_a_valid_config_at_both_sizes(suite) -> None:
    _, cases = suite
    from suite.parity import config_of

    from megalm.config.check import violations

    for case in cases.CASES:
        for size in cases.SIZES:
            assert violations(config_of(case, size), 1) == [], case.name


def test_every_layout_is_a_valid_config(suite) -> None:
    _, cases = suite
    from megalm.config.check import violations
    from megalm.config.compose import compose

    for layout in cases.LAYOUTS:
        for size in cases.SIZES.values():
            config = compose([*cases.BASE, *size, *layout.overrides])
            assert violations(config, layout.ranks) == [], layout.name


def test_a_case_that_is_off_fails(suite, monkeypatch) -> None:
    _, cases = suite
    from suite import parity

    case = cases.Case("fp32")
    trace = parity.reference(parity.config_of(case, "cpu"))
    monkeypatch.setattr(parity, "on_device", lambda config, device: trace)
    assert "±0.0e+00" in parity.check(case, "cpu")
    wrong = type(trace)([loss + 1e-3 for loss in trace.losses], trace.grad_norms, {}, {})
    monkeypatch.setattr(parity, "on_device", lambda config, device: wrong)
    with pytest.raises(parity.MismatchError, match="at most"):
        parity.check(case, "cpu")
    nan = type(trace)([float("nan")] * 6, trace.grad_norms, {}, {})
    monkeypatch.setattr(parity, "on_device", lambda config, device: nan)
    with pytest.raises(parity.MismatchError):
        parity.check(case, "cpu")


def test_without_a_gpu_it_says_so() -> None:
    done = subprocess.run(
        [sys.executable, str(RUN)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout.splitlines()[0][:14]) == (0, "no CUDA device")
