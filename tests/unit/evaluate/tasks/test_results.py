"""Results: rows, tables, files in the run's folder, and two runs compared."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest

from megalm.cli.task_options import add_task_options, tasks_of_options
from megalm.cli.task_results import show_comparison, show_results
from megalm.config.compose import compose, save_config
from megalm.errors import ConfigError, DataError
from megalm.evaluate.tasks import compare
from megalm.evaluate.tasks.compare import compare_results
from megalm.evaluate.tasks.of_config import check_tasks, tasks_of_config
from megalm.evaluate.tasks.requests import prepare_tasks
from megalm.evaluate.tasks.results import (
    HEADINGS,
    as_json,
    checkpoint_hash,
    items,
    metrics_row,
    save_results,
    signatures,
    table,
)
from megalm.evaluate.tasks.run import TaskResult, evaluate_tasks
from megalm.runs.record import decode_row, encode_row
from tests.unit.evaluate.tasks.tiny_models import Bigrams, Scripted, byte_level, written

TOKENIZER = byte_level()


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written(
        Path("sums.jsonl"),
        *(json.dumps({"context": f"Q: What is {n} plus 1? A:", "completion": f" {n + 1}"}) for n in range(60)),
    )
    written(Path("texts.jsonl"), *(json.dumps({"text": f"{n} the cat sat on the mat"}) for n in range(20)))


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_task_options(parser)
    return parser.parse_args(arguments)


def counting(share: int) -> Scripted:
    """Right in one of ``share`` sums."""

    def say(prompt: str) -> str:
        number = int(prompt.split()[-4])
        return f" {number + 1}" if number % share == 0 else " 0"

    return Scripted(TOKENIZER, say, name=f"one-in-{share}")


def results_of(model: Bigrams, *arguments: str) -> list[TaskResult]:
    tasks, _ = tasks_of_options(parsed(*arguments))
    return evaluate_tasks(model, prepare_tasks(tasks, model.tokenizer, model.config.model.sequence_length))


SUMS = ("--task", "arithmetic", "--task-data", "sums.jsonl")
BOTH = (*SUMS, "--task", "cloze", "--task-data", "texts.jsonl")


def test_a_row_for_metrics_jsonl_and_a_table() -> None:
    results = results_of(counting(3), *BOTH, "--examples", "2", "--limit", "30")
    row = metrics_row(results)
    assert row["arithmetic/exact_match"] == pytest.approx(10 / 30)
    assert row["arithmetic/exact_match_low"] < 1 / 3 < row["arithmetic/exact_match_high"]
    assert {f"cloze/{name}{end}" for name in ("accuracy", "perplexity") for end in ("", "_low", "_high")} <= set(row)
    assert decode_row(encode_row({"step": 7, **row})) == {"step": 7, **row}
    rows = table(results)
    assert all(len(each) == len(HEADINGS) for each in rows)
    assert rows[0][:5] == ("arithmetic", "30", "2", "exact_match", "0.3333")
    assert [each[0] for each in rows] == ["arithmetic", "cloze", "", "", ""]
    assert results[0].notes() == []
    unfinished = results_of(Bigrams(TOKENIZER, sequence_length=64), *SUMS, "--limit", "3")[0]
    assert unfinished.notes() == ["arithmetic: 3 of 3 texts ended at max_new_tokens=16"]
    assert signatures(results)[0] == "arithmetic/exact_match: normalise:none"


def test_answers_that_normalisation_empties_are_told_of() -> None:
    """SQuAD's takes the letter A for an article: nothing is left of it, and a text of nothing equals it."""
    letters = [("What?", "A"), ("Who?", "B"), ("Where?", "the"), ("When?", "")]
    written(Path("letters.jsonl"), *(json.dumps({"q": q, "right": [right] if right else []}) for q, right in letters))
    task = "kind: generation\ndata: letters.jsonl\nprompt: '{{ q }}'\ntarget: x\nreferences: right\nmetrics: "
    written(Path("squad.yaml"), task + "[exact_match, f1]")
    written(Path("plain.yaml"), task + "[{exact_match: {normalise: none}}]")
    silent = Scripted(TOKENIZER, lambda prompt: "", name="silent")
    squad, plain = (results_of(silent, "--task", f"{name}.yaml")[0] for name in ("squad", "plain"))
    assert squad.metric("exact_match").value == 0.75
    assert [note.partition(" by ")[0] for note in squad.notes()] == [
        f"squad/{name}: of 2 right answers nothing is left" for name in ("exact_match", "f1")
    ]
    assert plain.metric("exact_match").value == 0.25
    assert plain.notes() == []


def test_files_hold_everything_and_are_replaced_by_the_same_evaluation_alone(tmp_path: Path) -> None:
    model = counting(3)
    checkpoint = tmp_path / "runs" / "tiny" / "checkpoints" / "step-00000007"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    model.checkpoint = str(checkpoint)
    run = tmp_path / "runs" / "tiny"
    (path,) = save_results(run, results_of(model, *SUMS), model.config)
    assert path.parent == run / "results"
    assert path.name.startswith("arithmetic-step-00000007-")
    saved = json.loads(path.read_text())
    assert saved["checkpoint_sha256"] == checkpoint_hash(str(checkpoint)) is not None
    assert set(saved["versions"]) >= {"megalm", "python", "torch", "sacrebleu", "rouge-score"}
    assert saved["config"]["run"]["name"] == "one-in-3"
    assert saved["metrics"]["exact_match"]["value"] == pytest.approx(20 / 60)
    assert (saved["seed"], saved["definition"]["examples"], saved["items"]) == (1234, 0, 60)
    rows = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
    assert rows[3] == {
        "item": 3,
        "place": "sums.jsonl:4",
        "prompt": "Q: What is 3 plus 1? A:",
        "examples": [],
        "output": " 4",
        "finish": "stop",
        "answer": "4",
        "references": ["4"],
        "scores": {"exact_match": 1.0},
    }
    moved = Path("elsewhere.jsonl")
    moved.write_bytes(Path("sums.jsonl").read_bytes())
    again = save_results(run, results_of(model, *SUMS[:3], str(moved)), model.config)
    assert again == [path], "the same task, data and weights"
    others = [
        *save_results(run, results_of(model, *SUMS, "--examples", "1"), model.config),
        *save_results(run, results_of(model, *SUMS, "--limit", "5"), model.config),
    ]
    assert len({path, *others}) == 3
    assert len(list(path.parent.iterdir())) == 6, "no temporary file stays"


def test_rows_of_choices_and_targets(tmp_path: Path) -> None:
    written(Path("c.jsonl"), '{"question": "Who?", "choices": ["a cat", "a dog"], "answer": 1}')
    choose = results_of(Bigrams(TOKENIZER), "--task", "multiple_choice", "--task-data", "c.jsonl")[0]
    (row,) = items(choose)
    assert [choice["text"] for choice in row["choices"]] == ["a cat", "a dog"]
    assert row["right"] == 1
    assert set(row["scores"]) == {found.name for found in choose.metrics}
    cloze = results_of(Bigrams(TOKENIZER), "--task", "cloze", "--task-data", "texts.jsonl")[0]
    first = next(items(cloze))
    assert (first["target"], first["tokens"]) == ("mat", len(cloze.prepared.asked[0].score[0].continuation))
    json.dumps(as_json(cloze, Bigrams(TOKENIZER).config), allow_nan=False)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("a file")
    with pytest.raises(DataError, match="results: cannot be written: File exists"):
        save_results(tmp_path, results_of(counting(3), *SUMS), counting(3).config)


def test_two_runs_are_compared_on_the_same_items() -> None:
    better, worse = results_of(counting(2), *BOTH), results_of(counting(6), *BOTH)
    found = compare_results(better, worse)
    assert [(each.task, each.metric) for each in found][:2] == [("arithmetic", "exact_match"), ("cloze", "accuracy")]
    first = found[0]
    assert (first.difference.first, first.difference.second) == pytest.approx((30 / 60, 10 / 60))
    assert first.difference.first_better == 1.0
    assert first.difference.p_value < 0.01
    assert len(first.row()) == len(compare.HEADINGS)
    assert found[1].difference.p_value == 1.0, "their likelihoods are the same"
    json.dumps([each.as_json() for each in found], allow_nan=False)


def test_runs_that_were_asked_something_else_are_not_compared() -> None:
    model = counting(2)
    base = results_of(model, *SUMS)
    with pytest.raises(DataError) as refused:
        compare_results(base, results_of(model, *SUMS, "--limit", "9", "--examples", "1"))
    assert str(refused.value) == (
        "task arithmetic: examples, limit differ between the runs compared; compare two runs by one task file and one "
        "command"
    )
    lines = Path("sums.jsonl").read_text().splitlines()
    written(Path("other.jsonl"), *lines[:5], lines[5].replace(" 6", " 7"), *lines[6:])
    with pytest.raises(DataError, match=r"not the same items \(sums.jsonl:6\); compare two runs on the same data"):
        compare_results(base, results_of(model, *SUMS[:3], "other.jsonl"))
    written(Path("other.jsonl"), *lines[:-1])
    with pytest.raises(DataError, match=r"not the same items \(60 and 59 items\)"):
        compare_results(base, results_of(model, *SUMS[:3], "other.jsonl"))


def test_a_model_whose_likelihoods_are_no_numbers_is_refused() -> None:
    class Broken(Bigrams):
        def score(self, requests, *, progress=None):
            found = super().score(requests, progress=progress)
            return [replace(each, log_probabilities=(float("nan"),)) for each in found]

    with pytest.raises(DataError) as refused:
        results_of(Broken(TOKENIZER), "--task", "cloze", "--task-data", "texts.jsonl")
    assert str(refused.value) == (
        "texts.jsonl:1: the model's likelihood is not finite; another checkpoint (task cloze)"
    )


def test_options_are_checked_before_anything_is_loaded() -> None:
    assert tasks_of_options(parsed()) == ([], None)
    with pytest.raises(ConfigError) as refused:
        tasks_of_options(parsed(*SUMS, "--examples", "-1", "--limit", "0", "--seed", "-1", "--batch-size", "0"))
    assert refused.value.lines == [
        "--examples=-1: out of range; 0 to 2147483647",
        "--limit=0: out of range; 1 to 2147483647",
        "--seed=-1: out of range; 0 to 9223372036854775807",
        "--batch-size=0: out of range; 1 to 2147483647",
    ]
    with pytest.raises(ConfigError) as refused:
        tasks_of_options(parsed("--limit", "3", "--task-data", "x"))
    assert refused.value.lines == [
        '--task-data=["x"]: there is no --task that it is for; --task NAME, or leave it out',
        "--limit=3: there is no --task that it is for; --task NAME, or leave it out",
    ]
    with pytest.raises(ConfigError, match="--task-data=~nobody-here/x: there is no home folder of"):
        tasks_of_options(parsed(*SUMS[:3], "~nobody-here/x"))


def test_the_tasks_of_a_config() -> None:
    base = ["experiment=quickstart", "evaluate.tasks=[arithmetic,cloze]"]
    config = compose([*base, "evaluate.data=[sums.jsonl,texts.jsonl]", "evaluate.limit=5", "evaluate.examples=1"])
    loaded = tasks_of_config(config)
    assert [(each.task.name, len(each.questions), each.task.examples) for each in loaded] == [
        ("arithmetic", 5, 1),
        ("cloze", 5, 1),
    ]
    assert check_tasks(config) == "tasks          arithmetic (5 items), cloze (5 items)"
    elsewhere = compose([*base, "evaluate.data=[sums.jsonl,/cluster/texts.jsonl]"])
    assert check_tasks(elsewhere) == "tasks          not checked: /cluster/texts.jsonl is not on this machine"
    with pytest.raises(DataError, match=r"/cluster/texts.jsonl: there is no such file"):
        tasks_of_config(elsewhere)
    with pytest.raises(ConfigError, match=r"data=null: the task arithmetic names no data; evaluate.data=\[FILE\], or"):
        tasks_of_config(compose(base))
    assert check_tasks(compose(["experiment=quickstart"])) is None


def test_a_config_of_before_there_were_tasks_loads(tmp_path: Path) -> None:
    from megalm.config.compose import load_run_config

    config = compose(["experiment=quickstart"])
    save_config(config, tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text[: text.index("evaluate:")])
    assert load_run_config(tmp_path) == config


def test_tables_and_json_on_the_terminal(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = counting(2)
    better, worse = results_of(model, *BOTH), results_of(counting(6), *BOTH)
    files = save_results(tmp_path, better, model.config)
    show_results(better, model.config, files, as_json=False)
    out = capsys.readouterr().out
    assert ["arithmetic", "60", "0", "exact_match", "0.5000"] in [line.split()[:5] for line in out.splitlines()]
    assert "arithmetic/exact_match: normalise:none" in out
    assert f"kept in  {files[0]}, and its items in {files[0].stem}.jsonl" in out
    show_results(better, model.config, files, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["results"][0]["metrics"]["exact_match"]["value"] == 0.5
    assert found["files"] == [str(file) for file in files]
    compared = compare_results(better, worse)
    show_comparison(("runs/a", "runs/b"), compared, as_json=False)
    out = capsys.readouterr().out
    assert out.startswith("A is runs/a, B is runs/b\n")
    assert "100.0%" in out and "…" not in out
    show_comparison(("runs/a", "runs/b"), compared, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert (found["A"], found["comparison"][0]["first_better"]) == ("runs/a", 1.0)
