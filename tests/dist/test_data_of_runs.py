"""Data as runs read them: from a web server, blended, in phases; and what a run's ledger says of them afterwards."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from cli_runs import losses_of, run, steps_of
from fork_server import run_megalm, server

from megalm.data.tokenization.tokenizer import Tokenizer
from megalm.runs.record import read_metrics, validation_rows
from tests.web_server import serve

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
ONE_RANK = ("parallel.tp=1", "parallel.pp=1", "launch.ranks=1", "engine.zero_stage=0")
SENTENCE = "a sentence that is found in the other dataset only, number {}. "


def tool(name: str, *arguments: str, launcher: tuple[str, ...] = ()) -> str:
    done = subprocess.run(
        [*launcher, sys.executable, str(REPOSITORY / "tools" / name), *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def megalm(*arguments: str, code: int = 0) -> str:
    with server().fork(run_megalm, arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        out, err = process.communicate(timeout=150)
    assert process.returncode == code, out + err
    return out + err


def evaluate(run_dir: Path, *overrides: str) -> dict[str, str]:
    lines = megalm("evaluate", str(run_dir), *overrides).splitlines()
    return dict(line.split(None, 1) for line in lines)


@pytest.fixture(scope="module")
def other_dataset(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four long documents in the words of ``tiny_dataset``."""
    folder = tmp_path_factory.mktemp("other")
    rows = [json.dumps({"text": "".join(SENTENCE.format(n) for n in range(k, k + 40))}) for k in range(4)]
    (folder / "other.jsonl").write_text("\n".join(rows), encoding="utf-8")
    tool(
        "prepare_data.py", "--corpus", "jsonl", "--input", str(folder / "other.jsonl"), "--out", str(folder / "out"),
        "--tokenizer", str(tiny_dataset / "tokenizer.json"), "--chunk-tokens", "256", "--val-fraction", "0.5",
    )  # fmt: skip
    return folder / "out"


@pytest.fixture(scope="module")
def blended(tiny_dataset: Path, other_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A finished run of ten steps over both, one of three samples from the other."""
    overrides = [
        *ONE_RANK,
        f"data.path=[{tiny_dataset},{other_dataset}]",
        "data.weights=[2,1]",
        f"run.dir={tmp_path_factory.mktemp('runs')}",
        "run.name=blend",
    ]
    code, output = run([*overrides, "train.steps=10"])
    assert code == 0, output
    return overrides


def folder_of(overrides: list[str]) -> Path:
    return Path(next(item for item in overrides if item.startswith("run.dir=")).removeprefix("run.dir=")) / "blend"


def test_a_web_server_and_a_command_give_the_run_that_files_give(blended, tiny_dataset, other_dataset, tmp_path):
    expected = losses_of(folder_of(blended))
    changes = [*ONE_RANK, "data.weights=[2,1]", f"run.dir={tmp_path}", f"data.cache_dir={tmp_path}/cache"]
    with serve(tiny_dataset) as server:
        paths = f"data.path=['{server.address}','pipe:cat {other_dataset}/{{file}}']"
        code, output = run([*changes, paths, "run.name=blend", "train.steps=10"])
        assert code == 0, output
        assert losses_of(tmp_path / "blend") == expected
        assert any(span for _, path, span in server.requests if path.endswith(".tar"))
    assert any(path.is_file() for path in (tmp_path / "cache").rglob("*")), "what a command fetched is kept"


def test_the_ledger_says_what_a_step_saw_and_when_a_document_was_seen(blended, other_dataset):
    run_dir = folder_of(blended)
    seen: Counter[str] = Counter()
    readings = []
    for step in range(1, 11):
        rows = [
            json.loads(line)
            for line in megalm("data", "show", str(run_dir), "--step", str(step), "--json").splitlines()
        ]
        assert len(rows) == 4
        for row in rows:
            seen[row["dataset"]] += 1
            readings += [(step, row["sample"], document["name"]) for document in row["documents"]]
    assert seen[f"{other_dataset}/train"] == pytest.approx(40 / 3, abs=1)
    name = next(name for _, _, name in readings if "other.jsonl" in name)
    reverse = [
        json.loads(line) for line in megalm("data", "show", str(run_dir), "--document", name, "--json").splitlines()
    ]
    assert [(row["step"], row["sample"], name) for row in reverse] == [r for r in readings if r[2] == name]
    text = megalm("data", "show", str(run_dir), "--document", name)
    assert text.startswith(f"{name}: seen in ") and "of 10 steps so far" in text
    assert "did you mean" in megalm("data", "show", str(run_dir), "--document", name + "0", code=3)


def test_other_weights_are_refused_until_they_are_a_phase_of_their_own(blended, other_dataset):
    run_dir = folder_of(blended)
    code, output = run([*blended, "train.steps=14", "data.weights=[1,1]"])
    assert code == 3, output
    assert "data.weights=" in output and "the checkpoint was trained with" in output and "data.phase=1" in output
    assert "Traceback" not in output
    assert steps_of(run_dir) == list(range(1, 11)), "nothing was lost"

    code, output = run([*blended, "train.steps=14", f"data.path={other_dataset}", "data.weights=[]", "data.phase=1"])
    assert code == 0, output
    assert steps_of(run_dir) == list(range(1, 15))
    rows = [json.loads(line) for line in megalm("data", "show", str(run_dir), "--step", "12", "--json").splitlines()]
    assert {row["dataset"] for row in rows} == {f"{other_dataset}/train"}
    assert "data.phase=0" in megalm("data", "show", str(run_dir), "--step", "2", code=3), (
        "it asks for that phase's data"
    )


def test_epochs_over_the_limit_are_refused_before_anything_starts(blended, other_dataset):
    code, output = run([*blended, "run.name=limited", "train.steps=100", "data.max_epochs=[0,1]"])
    assert code == 2, output
    assert re.search(
        rf"data\.max_epochs: the run reads {re.escape(str(other_dataset))} \d+\.\d\d times, the limit is 1", output
    )
    assert not (folder_of(blended).parent / "limited").exists()


def test_attention_within_documents_is_trained_validated_and_evaluated_alike(blended, tmp_path):
    """Large weights, so that what a token attends to is seen in the losses of a model that has hardly learned."""
    changes = [f"run.dir={tmp_path}", "train.steps=16", "model.init_std=0.4"]
    validated = ["train.validate_every=16", "train.validation_samples=1000000"]
    for more in (["run.name=across"], [*validated, "data.reset_at_documents=true"]):
        code, output = run([*blended, *changes, *more])
        assert code == 0, output
    within, across = losses_of(tmp_path / "blend"), losses_of(tmp_path / "across")
    assert max(abs(one - other) for (one, _), (other, _) in zip(within, across, strict=True)) > 1e-3, "other keys"
    (validation,) = validation_rows(read_metrics(tmp_path / "blend" / "metrics.jsonl"))
    evaluated = evaluate(tmp_path / "blend")
    assert float(evaluated["val_loss"]) == pytest.approx(validation["val_loss"], abs=1e-5)
    assert float(evaluated["val_accuracy"]) == pytest.approx(validation["val_accuracy"], abs=1e-5)
    otherwise = evaluate(tmp_path / "blend", "data.reset_at_documents=false")
    assert abs(float(otherwise["val_loss"]) - validation["val_loss"]) > 1e-3


def test_workers_under_mpirun_write_the_same_shards(tiny_dataset, tmp_path):
    mpirun = Path(sys.executable).parent / "mpirun"
    if not mpirun.exists():
        pytest.skip(f"mpirun is not installed beside {sys.executable}")
    arguments = (
        "--corpus", "text", "--input", str(REPOSITORY / "megalm" / "data"), "--chunk-tokens", "256",
        "--tokenizer", str(tiny_dataset / "tokenizer.json"), "--dedup", "exact", "--val-fraction", "0.2",
    )  # fmt: skip
    tool("prepare_data.py", *arguments, "--out", str(tmp_path / "one"), "--workers", "1")
    launcher = (str(mpirun), "--allow-run-as-root", "--oversubscribe", "-np", "3")
    said = tool("prepare_data.py", *arguments, "--out", str(tmp_path / "many"), "--executor", "mpi", launcher=launcher)
    assert said.count("ready") <= 1, "one rank alone speaks"
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.tar"))
    assert files
    for file in (*files, Path("train/index.json"), Path("val/index.json")):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "many" / file).read_bytes(), file


def test_a_small_encoder_learns_masked_words_on_four_ranks(tmp_path):
    """``quickstart_bert`` as it stands, smaller: it trains, reports its accuracy, and can be evaluated."""
    words = [f"word{chr(97 + n)}" for n in range(20)]  # in a circle: a masked one follows from its neighbours
    lines = (" ".join(words[(start + k) % 20] for k in range(11 + start % 37)) for start in range(2000))
    (tmp_path / "lines.txt").write_text("\n".join(lines), encoding="utf-8")
    tool(
        "prepare_data.py", "--corpus", "text", "--input", str(tmp_path / "lines.txt"), "--out", str(tmp_path / "data"),
        "--split-on", "line", "--tokenizer-vocab", "300", "--tokenizer-kind", "wordpiece", "--chunk-tokens", "256",
        "--val-fraction", "0.1",
    )  # fmt: skip
    code, output = run(
        [
            "experiment=quickstart_bert",
            f"data.path={tmp_path}/data",
            f"run.dir={tmp_path}",
            "run.name=bert",
            "model.sequence_length=32",
            "model.num_layers=2",
            "train.steps=150",
            "train.validate_every=150",
            "train.validation_samples=64",
            "train.global_batch_size=32",
            "train.micro_batch_size=8",
            "optim.lr=3e-3",
        ]
    )
    assert code == 0, output
    assert "BERT" in output and "of masked tokens recovered (always guessing the commonest token:" in output
    evaluated = evaluate(tmp_path / "bert")
    assert float(evaluated["val_accuracy"]) > 1.5 * float(evaluated["val_commonest"]) > 0
    refused = megalm("generate", str(tmp_path / "bert"), "--prompt", "def", code=2)
    assert "causal" in refused and "Traceback" not in refused
    assert Tokenizer.load(tmp_path / "bert" / "tokenizer.json").vocab_size <= 300
