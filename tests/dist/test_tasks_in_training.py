"""Tasks that a run is asked while it trains: on every kind of layout the answers are those of its checkpoints."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cli_runs import losses_of, run
from fork_server import run_megalm, server

from megalm.runs.record import read_metrics

pytestmark = pytest.mark.slow

LIKELY = """
kind: cloze
prompt: "{{ before }}"
target: "{{ word }}"
metrics: [perplexity, accuracy]
"""
WRITTEN = """
kind: generation
prompt: "{{ before }}"
target: "{{ word }}"
max_new_tokens: 6
metrics: [chrf]
"""
PLACES = {"def sum": "(values)", "return ": "None", "from __future__ ": "import annotations", "class Group": ":"}

LAYOUTS = {
    "virtual stages, two replicas": ["parallel=pp2_interleaved", "model.num_layers=6", "launch.ranks=4"],
    "sequence parallel": ["parallel=tp2_pp2_sp", "launch.ranks=4", "train.micro_batch_size=1"],
    "context parallel, two replicas": ["parallel=cp2", "launch.ranks=4"],
    "ZeRO-2": ["parallel=single", "launch.ranks=2", "engine.zero_stage=2", "engine.dtype=bf16"],
}


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("tasks")
    rows = "".join(f"{json.dumps({'before': before, 'word': word})}\n" for before, word in PLACES.items())
    (folder / "items.jsonl").write_text(rows)
    for name, text in (("likely", LIKELY), ("written", WRITTEN)):
        (folder / f"{name}.yaml").write_text(f"{text}data: {folder}/items.jsonl\n")
    return [f"evaluate.tasks=[{folder}/likely.yaml,{folder}/written.yaml]"]


def evaluated(checkpoint: Path, asked: list[str]) -> dict[str, Any]:
    """What ``megalm evaluate`` says of a checkpoint, on one rank: metrics by name."""
    files = asked[0].removeprefix("evaluate.tasks=[").removesuffix("]").split(",")
    arguments = ["evaluate", str(checkpoint), *(word for file in files for word in ("--task", file)), "--json"]
    with server().fork(run_megalm, arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        out, err = process.communicate(timeout=150)
    assert process.returncode == 0, out + err
    return {
        f"{result['task']}/{name}": metric["value"]
        for result in json.loads(out)["results"]
        for name, metric in result["metrics"].items()
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_answers_are_those_of_the_checkpoints_and_training_is_not_disturbed(
    layout: str, asked: list[str], tiny_dataset: Path, tmp_path: Path
) -> None:
    common = [*LAYOUTS[layout], f"data.path={tiny_dataset}", f"run.dir={tmp_path}", "train.steps=4"]
    code, output = run([*common, "run.name=plain"])
    assert code == 0, output
    code, output = run([*common, "run.name=asked", *asked, "evaluate.every=2", "checkpoint.every=2"])
    assert code == 0, output
    assert losses_of(tmp_path / "asked") == losses_of(tmp_path / "plain")

    rows = [row for row in read_metrics(tmp_path / "asked" / "metrics.jsonl") if "tasks_seconds" in row]
    assert [row["step"] for row in rows] == [2, 4]
    bound = 2e-2 if layout == "ZeRO-2" else 1e-5  # bf16 sums in another order
    for row in rows:
        assert "tasks_error" not in row
        found = evaluated(tmp_path / "asked" / "checkpoints" / f"step-{row['step']:08d}", asked)
        assert set(found) == {"likely/perplexity", "likely/accuracy", "written/chrf"}
        assert {name: row[name] for name in found} == pytest.approx(found, rel=bound)
    later = [row for row in read_metrics(tmp_path / "asked" / "metrics.jsonl") if "evaluated" in row]
    assert [Path(row["evaluated"]).name for row in later] == ["step-00000002", "step-00000004"]
    names = {path.name.rsplit("-", 1)[0] for path in (tmp_path / "asked" / "results").glob("*.json")}
    assert {"likely-step-00000002", "written-step-00000002", "likely-step-00000004"} <= names
    assert "step 4/4  task likely: perplexity" in output


def test_what_is_wrong_is_said_before_a_rank_starts(asked: list[str], tiny_dataset: Path, tmp_path: Path) -> None:
    common = [f"data.path={tiny_dataset}", f"run.dir={tmp_path}", "run.name=refused", "train.steps=2"]
    code, output = run([*common, *asked, "parallel=single", "launch.ranks=2", "engine.zero_stage=3"])
    assert code == 2
    assert "engine.zero_stage=3 holds no parameter whole between steps" in output
    code, output = run([*common, *asked, "model.sequence_length=8", "parallel=single"])
    assert code == 3
    assert "items.jsonl:3: prompt: it has" in output
    assert "the model's sequences have 8" in output
    assert not (tmp_path / "refused" / "metrics.jsonl").exists()
