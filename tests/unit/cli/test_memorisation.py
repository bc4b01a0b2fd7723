"""``megalm evaluate RUN --task memorisation``, called in this process on a run that megalm has trained."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import megalm
from megalm.checkpoint.manifest import read_manifest
from megalm.checkpoint.store import locate
from megalm.cli.main import main
from megalm.config.compose import load_run_config
from megalm.data.shards.tokens import SplitTokens
from megalm.data.stream.phases import order_of
from megalm.runs.ledger import corpora_of_run
from megalm.runs.record import read_metrics

TASK = "base: memorisation\nprompt_tokens: [2, 6]\ncontinuation_tokens: 4\nlimit: 30\n"


@pytest.fixture(autouse=True)
def _task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(TASK, encoding="utf-8")


def evaluated(capsys: pytest.CaptureFixture, *arguments: str | Path, code: int = 0) -> str:
    found = main(["evaluate", *map(str, arguments)])
    captured = capsys.readouterr()
    assert found == code, captured.out + captured.err
    if code:
        assert captured.out == "" and "Traceback" not in captured.err
    return captured.out if code == 0 else captured.err


def record_of(capsys: pytest.CaptureFixture, *arguments: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    found = json.loads(evaluated(capsys, *arguments, "--json"))
    (file,), (record,) = found["files"], found["results"]
    assert json.loads(Path(file).read_text(encoding="utf-8")) == record
    rows = Path(file).with_suffix(".jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    return record, [json.loads(row) for row in rows]


def times_by_hand(run: Path, rows: list[dict[str, Any]], samples: int, tokens: int) -> list[int]:
    """How often the first samples of a run read the passages of some rows, from every sequence that was taken."""
    config = load_run_config(run)
    corpora = corpora_of_run(config, run)
    read = Counter(order_of(corpora, config.data, config.run.seed)(np.arange(samples))[2].tolist())
    index = corpora.shards[0].index
    text = SplitTokens(corpora.shards[0].store).at(0, index.tokens).tolist()
    starts = {document["name"]: document["start"] for document in _documents(config)}
    found = []
    for row in rows:
        start = starts[row["sources"][0]["document"]] + row["sources"][0]["first"]
        passage = text[start : start + tokens]
        places = [at for at in range(len(text) - tokens + 1) if text[at : at + tokens] == passage]
        held_by = [{(at + offset) // 32 for offset in range(tokens - 1)} for at in places]
        found.append(sum(min(read[sequence] for sequence in each) for each in held_by))
    return found


def test_a_run_is_asked_for_what_it_read_until_its_checkpoint(
    short_runs: tuple[Path, Path], capsys: pytest.CaptureFixture
) -> None:
    run = short_runs[0]
    record, rows = record_of(capsys, run, "--task", "mine.yaml")
    assert record["samples_read"] == read_manifest(locate(run).path).data["consumed_samples"] == 32
    trained = [row for row in rows if row["group"] != "held out"]
    assert [row["times"] for row in trained] == times_by_hand(run, trained, 32, 10)
    assert record["groups"] == Counter(row["group"] for row in rows)
    assert {"held out", "not read yet", "1"} <= set(record["groups"])
    assert record["drawn"]["training"]["too_short"] > 0
    assert record["metrics"]["verbatim/1/6"]["low"] <= record["metrics"]["verbatim/1/6"]["value"]


def test_an_earlier_checkpoint_has_read_less_than_the_run(
    tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    overrides = [
        *("experiment=quickstart", f"data.path={tiny_dataset}", f"run.dir={tmp_path}", "run.name=two"),
        *("parallel=single", "engine.dtype=fp32", "model.num_layers=1", "model.hidden_size=16", "model.num_heads=2"),
        *("model.sequence_length=32", "train.steps=60", "checkpoint.every=20", "checkpoint.keep_last=0"),
        *(
            "optim.warmup_tokens=0",
            "report.prompt=null",
            "report.plot=false",
            "logging.tensorboard=false",
            "logging.wandb=disabled",
        ),
    ]
    run = megalm.train(megalm.compose(overrides)).folder
    capsys.readouterr()
    times = {}
    for step in (20, 60):
        record, rows = record_of(capsys, run / "checkpoints" / f"step-{step:08d}", "--task", "mine.yaml")
        assert record["samples_read"] == 8 * step
        trained = [row for row in rows if row["group"] != "held out"]
        times[step] = [row["times"] for row in trained]
        assert times[step] == times_by_hand(run, trained, 8 * step, 10)
        assert all(reading <= step for case in record["worst"] for reading in case["steps"])
    assert max(times[20]) < max(times[60])
    kept = [row for row in read_metrics(run / "metrics.jsonl") if "evaluated" in row]
    assert [row["step"] for row in kept] == [20, 60]
    assert kept[1]["mine/verbatim/held_out/6"] == record["metrics"]["verbatim/held out/6"]["value"]


def _documents(config: Any) -> list[dict[str, Any]]:
    folder = Path(config.data.path[0]) / "train"
    files = sorted(folder.glob("*.documents.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def test_the_table_and_the_options(short_runs: tuple[Path, Path], capsys: pytest.CaptureFixture) -> None:
    shown = evaluated(capsys, short_runs[0], "--task", "mine.yaml", "--limit", 2, "--seed", 5, "--batch-size", 3)
    assert "times read" in shown and "held out" in shown and "not read yet" in shown
    assert "are shorter than 10 tokens and their end" in shown
    assert "passages that were read are continued word for word" in shown
    assert shown.rstrip().splitlines()[-1].startswith(f"kept in  {short_runs[0]}/results/mine-step-00000004-")


@pytest.mark.slow
def test_ranks_that_split_the_model_answer_the_same(
    short_runs: tuple[Path, Path], capsys: pytest.CaptureFixture
) -> None:
    run = short_runs[0]
    alone = record_of(capsys, run, "--task", "mine.yaml", "--limit", 4)[1]
    assert record_of(capsys, run, "parallel.tp=2", "parallel.pp=2", "--task", "mine.yaml", "--limit", 4)[1] == alone


def test_what_makes_no_sense_is_refused(short_runs: tuple[Path, Path], capsys: pytest.CaptureFixture) -> None:
    run, other = short_runs
    Path("x.jsonl").write_text("{}\n")
    assert evaluated(
        capsys, run, "--task", "mine.yaml", "--task", "arithmetic", "--task-data", "x.jsonl", "--examples", 2, code=2
    ).splitlines() == [
        '--task=["mine.yaml", "arithmetic"]: mine asks for what the run has read, and no other task goes with it; '
        "--task mine alone, and a command of their own for the others",
        '--task-data=["x.jsonl"]: mine asks for what the run has read; leave it out',
        "--examples=2: mine has prompts without examples; leave it out",
    ]
    two = evaluated(capsys, run, other, "--task", "mine.yaml", code=2)
    assert two == f"{run} {other}: --task=mine asks a run for what it has read itself; one run\n"
    assert "[8, 16, 32]: prompt and continuation_tokens=32 are 64 tokens, more than model.sequence_length=32" in (
        evaluated(capsys, run, "--task", "memorisation", code=2)
    )
    assert "--limit=0: out of range" in evaluated(capsys, run, "--task", "mine.yaml", "--limit", 0, code=2)


def test_runs_whose_data_are_not_known_are_refused(
    short_runs: tuple[Path, Path], tiny_dataset: Path, capsys: pytest.CaptureFixture
) -> None:
    run = short_runs[0]
    gone = evaluated(capsys, run, "data.path=nowhere", "--task", "mine.yaml", code=3)
    assert gone.startswith("data.path=nowhere: no such folder")
    phase = evaluated(capsys, run, "data.phase=1", "--task", "mine.yaml", code=3)
    assert phase == (
        "data.phase=1: what the checkpoint has read is of phase 0; give its data: data.phase=0 "
        "model.sequence_length=32 data.path=…\n"
    )
    seed = evaluated(capsys, run, "run.seed=77", "--task", "mine.yaml", code=3)
    assert seed.startswith("run.seed=77: the checkpoint was trained with ")
    shutil.copytree(run, "recordless")
    Path("recordless/metrics.jsonl").unlink()
    assert "only this record says which samples" in evaluated(capsys, "recordless", "--task", "mine.yaml", code=3)


def test_a_converted_model_has_no_ledger(short_runs: tuple[Path, Path], capsys: pytest.CaptureFixture) -> None:
    assert main(["convert", "--from", "megalm", "--to", "hf", str(short_runs[0]), "exported"]) == 0
    assert main(["convert", "--from", "hf", "--to", "megalm", "exported", "converted"]) == 0
    capsys.readouterr()
    told = evaluated(capsys, "converted", "--task", "mine.yaml", code=3)
    assert "says nothing of the samples that it was trained on, as a converted model does" in told


def test_nothing_to_ask_for_is_said(short_runs: tuple[Path, Path], capsys: pytest.CaptureFixture) -> None:
    Path("none.yaml").write_text(f"{TASK}documents: no-such-name\n", encoding="utf-8")
    told = evaluated(capsys, short_runs[0], "--task", "none.yaml", code=3)
    assert "training documents has this in its name; megalm data show DATASET --documents lists them" in told
