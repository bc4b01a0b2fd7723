"""docs/evaluation.md is true: its task of one's own runs as it says, and it names every field, metric and option."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megalm.evaluate.tasks.load import load_tasks
from megalm.evaluate.tasks.metrics.registry import METRICS
from megalm.evaluate.tasks.requests import prepare_tasks
from megalm.evaluate.tasks.run import evaluate_tasks
from megalm.evaluate.tasks.task import Task
from megalm.evaluate.tasks.task_file import BASE, FIELDS, read_task, task_names
from tests.unit.evaluate.tasks.tiny_models import Scripted, byte_level

PAGE = (Path(__file__).resolve().parents[4] / "docs" / "evaluation.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def block(language: str, number: int = 0) -> str:
    return [text for kind, text in BLOCKS if kind == language][number]


def test_a_task_written_from_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "capitals.jsonl").write_text(block("json"), encoding="utf-8")
    (tmp_path / "capitals.yaml").write_text(block("yaml"), encoding="utf-8")
    tokenizer = byte_level()
    prepared = prepare_tasks(load_tasks(["capitals.yaml"]), tokenizer, 512)
    assert prepared[0].asked[0].prompt == block("text").rstrip("\n")

    def say(prompt: str) -> str:
        return " City of Paris." if "France" in prompt[-12:] else " Oslo"

    (result,) = evaluate_tasks(Scripted(tokenizer, say, sequence_length=512), prepared)
    assert [found.of_items() for found in result.metrics] == [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]]


def test_a_task_that_takes_over_another_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf" / "task").mkdir(parents=True)
    (tmp_path / "conf" / "task" / "en_fr.yaml").write_text(block("yaml", 1), encoding="utf-8")
    task = read_task("en_fr")
    assert task.settings == {"source_language": "English", "target_language": "French"}
    assert [(each.name, dict(each.options)) for each in task.metrics] == [
        ("bleu", {"tokenize": "intl"}),
        ("chrf", {"word_order": 2}),
    ]


def test_the_tables_name_everything() -> None:
    cells = " ".join(re.findall(r"^\| ([^|]*) \|", PAGE, re.MULTILINE))
    named = set(re.findall(r"`([\w ]+)`", cells))
    assert set(FIELDS) | {BASE} | set(METRICS) | set(task_names()) <= named
    defaults = vars(Task(name="x", places={"": ""}, kind="cloze", prompt="", metrics=()))
    assert (defaults["max_new_tokens"], defaults["seed"], defaults["hf_split"]) == (64, 1234, "test")
    for kinds in METRICS.values():
        for kind in kinds:
            assert all(f"`{option}" in PAGE for option in kind.options), kind
