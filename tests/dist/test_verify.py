"""``megalm verify`` on real ranks: a sound config is proven, a wrong layer and a lost rank are found and named."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
from pathlib import Path

import hanging
import pytest
import wrong_layers
from fork_server import run_megalm, server

from megalm.cli.main import main
from megalm.errors import ExitCode
from megalm.launch.function_ranks import RankFailure, run_on_ranks

pytestmark = pytest.mark.slow


def test_a_sound_config_is_proven_without_a_word_besides(tmp_path: Path) -> None:
    command = ["verify", "experiment=quickstart", "parallel=tp2", f"run.dir={tmp_path}", "run.name=sound"]
    with server().fork(run_megalm, command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        out, err = process.communicate(timeout=250)
    path = tmp_path / "sound" / "layout_certificate.json"
    report = path.read_text() if path.exists() else ""  # with the traceback of a rank that failed
    assert (process.returncode, err) == (0, ""), out + err + report
    assert out.splitlines()[-1] == f"proven: layout certificate in {path}"
    certificate = json.loads(path.read_text())
    rows = {(row["layout"], row["dtype"]): row for row in certificate["rows"]}
    assert rows.keys() == {("one rank", "bf16"), ("tp2", "bf16"), ("dp2", "bf16"), ("tp2", "fp32")}
    assert certificate["passed"] and all(row["passed"] for row in rows.values())
    assert certificate["reference"]["bf16"]["clipped_steps"] == [1, 2, 3, 4, 5, 6]
    assert 0 < rows["tp2", "fp32"]["differences"]["weights"] < 1e-5


def test_a_wrong_layer_and_a_lost_rank_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("megalm.verify.run.train_case", wrong_layers.train_case)
    path = tmp_path / "certificate.json"
    config = ["experiment=quickstart", "parallel=tp2", "engine.dtype=fp32", f"run.dir={tmp_path}"]
    assert main(["verify", *config, "--json", str(path)]) == ExitCode.NOT_PROVEN
    out, err = capfd.readouterr()
    assert err == ""
    assert out.splitlines()[-1] == f"NOT PROVEN: layout certificate in {path}"
    assert "FAIL dp2 (fp32): rank" in out and "RuntimeError: this replica is lost" in out
    assert "FAIL tp2 (fp32): gradient norm differs by" in out
    rows = {row["layout"]: row for row in json.loads(path.read_text())["rows"]}
    assert {name: row["passed"] for name, row in rows.items()} == {"one rank": True, "tp2": False, "dp2": False}
    assert "Traceback" in rows["dp2"]["report"]


def test_a_rank_that_dies_costs_its_own_item_alone() -> None:
    before, lost, after = run_on_ranks(2, hanging.act, ["add", "die", "add"])
    assert before == after == [3.0, 3.0]
    assert isinstance(lost, RankFailure)
    assert lost.summary == "rank 1 ended with exit code 9"
    assert "about to die" in lost.report, "what a rank printed is shown where it fails"


def test_ranks_that_hang_are_ended_and_their_stacks_shown() -> None:
    (hung,) = run_on_ranks(1, hanging.act, ["hang"], timeout_seconds=10)
    assert isinstance(hung, RankFailure)
    assert hung.summary == "no result after 10 s"
    assert "rank 0: stack" in hung.report and "_rank_main" in hung.report
    assert not multiprocessing.active_children()
