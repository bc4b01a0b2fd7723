"""The tasks that megalm ships: each loads, renders, runs and is scored as its benchmark is; on real data, too."""

from __future__ import annotations

import gzip
import json
from itertools import pairwise
from pathlib import Path

import pytest

from megalm.config.compose import conf_dir
from megalm.evaluate.tasks.load import Changes, load_tasks
from megalm.evaluate.tasks.requests import PreparedTask, prepare_tasks
from megalm.evaluate.tasks.run import TaskResult, evaluate_tasks
from megalm.evaluate.tasks.task_file import read_task, task_names
from tests.unit.evaluate.tasks.tiny_models import Bigrams, Scripted, byte_level, written

REAL = Path("/work/shared/data")
TOKENIZER = byte_level()
RECORDS = {
    "arithmetic": [
        {"context": "\n\nQ: What is 98 plus 45?\n\nA:", "completion": " 143"},
        {"context": "\n\nQ: What is 5 minus 12?\n\nA:", "completion": " -7"},
    ],
    "translation": [
        {"source": "A dog runs.", "target": "Ein Hund rennt."},
        {"source": "A man reads.", "target": "Ein Mann liest."},
    ],
    "summarisation": [
        {"dialogue": "#Person1#: Hello.\n#Person2#: Hi.", "summary": "They greet each other."},
        {"dialogue": "#Person1#: Bye.\n#Person2#: Bye.", "summary": "They part."},
    ],
    "qa": [
        {"context": "Oslo is in Norway.", "question": "Where is Oslo?", "answers": {"text": ["Norway", "in Norway"]}},
        {"context": "Oslo is in Norway.", "question": "Where is Rome?", "answers": {"text": []}},
    ],
    "multiple_choice": [
        {"question": "Where did the cat sit?", "choices": ["the mat", "the moon", "a horse"], "answer": 0},
        {"question": "Who rides?", "choices": ["the log", "a man"], "answer": 1},
    ],
    "cloze": [{"text": "the cat sat on the mat"}, {"context": "the dog sat on the", "target": "log"}],
}
PROMPTS = {
    "arithmetic": "\n\nQ: What is 5 minus 12?\n\nA: -7\n\nQ: What is 98 plus 45?\n\nA:",
    "translation": "English: A man reads.\nGerman: Ein Mann liest.\n\nEnglish: A dog runs.\nGerman:",
    "summarisation": (
        "#Person1#: Bye.\n#Person2#: Bye.\n\nSummary: They part.\n\n\n#Person1#: Hello.\n#Person2#: Hi.\n\nSummary:"
    ),
    "qa": (
        "Oslo is in Norway.\n\nQ: Where is Rome?\n\nA: unanswerable\n\nOslo is in Norway.\n\nQ: Where is Oslo?\n\nA:"
    ),
    "multiple_choice": "Question: Who rides?\nAnswer: a man\n\nQuestion: Where did the cat sit?\nAnswer:",
    "cloze": "the dog sat on the log\n\nthe cat sat on the",
}


def prepared(name: str, data: Path, length: int = 1024, **changes: int) -> PreparedTask:
    (task,) = prepare_tasks(load_tasks([name], [str(data)], Changes(**changes)), TOKENIZER, length)
    return task


def answered(name: str, data: Path, say: object = None, **changes: int) -> TaskResult:
    model = Scripted(TOKENIZER, say or (lambda prompt: ""), sequence_length=1024)
    (result,) = evaluate_tasks(model, [prepared(name, data, **changes)])
    return result


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Path]:
    return {name: written(tmp_path / f"{name}.jsonl", *map(json.dumps, rows)) for name, rows in RECORDS.items()}


def test_all_of_them_are_here_and_say_what_they_are() -> None:
    assert task_names() == sorted([*RECORDS, "memorisation"]), "which has no records"
    for name in RECORDS:
        assert (conf_dir() / "task" / f"{name}.yaml").read_text(encoding="utf-8").startswith("# ")
        task = read_task(name)
        assert task.about
        assert task.data is None, "no data are shipped"


@pytest.mark.parametrize("name", sorted(RECORDS))
def test_prompts_with_an_example(name: str, data: dict[str, Path]) -> None:
    assert prepared(name, data[name], examples=1).asked[0].prompt == PROMPTS[name]


@pytest.mark.parametrize("name", sorted(RECORDS))
def test_every_task_runs_and_gives_an_interval(name: str, data: dict[str, Path]) -> None:
    done: list[int] = []
    task = prepared(name, data[name], examples=1)
    (result,) = evaluate_tasks(Bigrams(TOKENIZER, sequence_length=1024), [task], progress=done.append)
    assert sum(done) == task.requests
    assert [found.name for found in result.metrics] == [choice.name for choice in read_task(name).metrics]
    for found in result.metrics:
        assert found.interval.low <= found.value <= found.interval.high or found.name == "bleu"
        assert len(found.of_items()) == 2


def test_arithmetic_reads_the_number_at_the_beginning(data: dict[str, Path]) -> None:
    def say(prompt: str) -> str:
        return " 143.\nQ: What" if "98 plus 45?\n\nA:" in prompt[-20:] else " 7"

    result = answered("arithmetic", data["arithmetic"], say)
    assert [answer.text for answer in result.answers] == ["143", "7"]
    assert result.metric("exact_match").of_items() == [1.0, 0.0], "the sign counts"


def test_questions_without_an_answer(data: dict[str, Path]) -> None:
    result = answered("qa", data["qa"], lambda prompt: " in Norway." if "Oslo?" in prompt[-12:] else " Unanswerable")
    assert result.metric("f1").value == result.metric("exact_match").value == 1.0
    wrong = answered("qa", data["qa"], lambda prompt: " unanswerable" if "Oslo?" in prompt[-12:] else " Italy")
    assert wrong.metric("f1").value == 0.0


def test_cloze_and_choices_by_a_model_of_bigrams(data: dict[str, Path]) -> None:
    model = Bigrams(TOKENIZER, sequence_length=1024)
    tasks = [prepared(name, data[name]) for name in ("cloze", "multiple_choice")]
    cloze, choice = evaluate_tasks(model, tasks)
    request = tasks[0].asked[0].score[0]
    ids = (request.context[-1], *request.continuation)
    by_hand = sum(model.log_probability(a, b) for a, b in pairwise(ids))
    assert cloze.answers[0].log_probability == pytest.approx(by_hand)
    assert choice.metric("accuracy_per_byte").name == choice.metrics[0].name, "the headline"
    scores = choice.answers[0].scores
    assert all(score.unconditional is not None and score.unconditional < 0 for score in scores)
    asked = [request for request in model.asked if request.context]
    assert len(asked) == len(set(asked)), "no request twice"


real = pytest.mark.skipif(not REAL.is_dir(), reason="the real data are not on this machine")


@real
def test_gpt3s_own_arithmetic() -> None:
    path = REAL / "gpt3_tasks" / "two_digit_addition.jsonl"
    task = prepared("arithmetic", path, examples=8)
    assert len(task.asked) == 2000
    right = {each.question.prompt: each.question.target for each in task.asked}
    result = answered("arithmetic", path, lambda prompt: " " + right["\n\nQ:" + prompt.rpartition("\n\nQ:")[2]])
    assert result.metric("exact_match").value == 1.0


@real
def test_multi30k_is_translated(tmp_path: Path) -> None:
    files = [REAL / "multi30k" / f"test_2016_flickr.{side}.gz" for side in ("en", "de")]
    sides = [gzip.decompress(file.read_bytes()).decode().splitlines() for file in files]
    pairs = [json.dumps({"source": en, "target": de}) for en, de in zip(*sides, strict=True)]
    data = tmp_path / "pairs.jsonl.gz"
    with gzip.open(data, "wt", encoding="utf-8") as file:
        file.write("\n".join(pairs))
    result = answered("translation", data, lambda prompt: " Ein Hund rennt auf der Straße.", limit=200)
    assert len(result.answers) == 200
    bleu, chrf = result.metrics
    assert bleu.metric.signature.startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert 0 < bleu.interval.low < bleu.value < bleu.interval.high < 100
    assert 0 < chrf.interval.low < chrf.value < chrf.interval.high < 100


@real
def test_dialogsum_does_not_fit_short_sequences_and_says_so() -> None:
    path = REAL / "dialogsum" / "dev.jsonl"
    task = prepared("summarisation", path, 8192, examples=2)
    assert len(task.asked) == 500
    assert task.notes() == []
    short = prepared("summarisation", path, 2000, examples=2, limit=40)
    assert "fewer examples, to fit" in short.notes()[0]
