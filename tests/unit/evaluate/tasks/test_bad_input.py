"""Every mistake in a task, its file or its data is one line: where it is, what is wrong, what would be right."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megalm.config.search_path import SearchPath
from megalm.errors import ConfigError, DataError
from megalm.evaluate.tasks.load import Changes, load_tasks
from megalm.evaluate.tasks.metrics import registry
from megalm.evaluate.tasks.task_file import read_task, task_names
from tests.unit.evaluate.tasks.tiny_models import written

WORDS = "exact_match, f1, bleu, chrf, rouge1, rouge2, rougeL or rougeLsum"
GOOD = 'kind: generation\nprompt: "{{ q }}"\ntarget: "{{ a }}"\nmetrics: [exact_match]\n'
CHOOSE = 'kind: multiple_choice\nprompt: "{{ q }}"\nchoices: choices\nanswer: "{{ answer }}"\nmetrics: [accuracy]\n'


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def lines_of(text: str, *records: Any, changes: Changes | None = None, data: str = "d.jsonl") -> list[str]:
    """What is said of a task file with some data; records that are text are lines as they are."""
    Path("mine.yaml").write_text(text, encoding="utf-8")
    written(Path("d.jsonl"), *(each if isinstance(each, str) else json.dumps(each) for each in records or [{"q": "x"}]))
    with pytest.raises((ConfigError, DataError)) as refused:
        load_tasks(["mine.yaml"], [data], changes)
    is_config = isinstance(refused.value, ConfigError)
    assert refused.value.exit_code == (2 if is_config else 3)
    return str(refused.value).splitlines()


def test_a_task_that_there_is_not() -> None:
    with pytest.raises(ConfigError) as refused:
        load_tasks(["arithmatic", "xyz", "none.yaml"])
    assert refused.value.lines == [
        "--task=arithmatic: there is no such task; did you mean arithmetic?",
        "--task=xyz: there is no such task; arithmetic, cloze, memorisation, multiple_choice, qa, summarisation or "
        "translation, or a file NAME.yaml",
        "--task=none.yaml: there is no such file; a task file, or a task's name",
    ]


def test_a_task_without_data_or_with_files_for_others() -> None:
    with pytest.raises(ConfigError) as refused:
        load_tasks(["qa"])
    assert str(refused.value).endswith(
        "conf/task/qa.yaml:6: data=null: the task qa names no data; --task-data FILE, or data: FILE in a task file"
    )
    with pytest.raises(ConfigError) as refused:
        load_tasks(["qa", "cloze"], ["a.jsonl"])
    assert str(refused.value) == (
        '--task-data=["a.jsonl"]: 1 for the 2 of --task; one for each, in their order, or none'
    )
    with pytest.raises(ConfigError, match="--task=qa: there are two tasks of this name; rename one file"):
        load_tasks(["qa", "qa"], ["a", "b"])


def test_everything_that_is_wrong_with_a_file_is_said_at_once() -> None:
    text = (
        "kind: generation\n"
        'prompt: "{{ q"\n'
        "metric: bleu\n"
        'target: "{{ a }}"\n'
        "metrics: [blue, exact_match, accuracy, {chrf: {word_order: 7, lower: 1}}, exact_match]\n"
        "examples: -1\n"
        "stop: [x, '']\n"
        "choices: c\n"
        "filters: [stripe, {regex: '('}]\n"
        "temperature: warm\n"
        "seed: 1.5\n"
        "about: 3\n"
        "examples_shared: 1\n"
        "settings: {item: 1}\n"
    )
    assert lines_of(text) == [
        "mine.yaml:2: prompt=\"{{ q\": no template: unexpected end of template, expected 'end of print statement'; "
        "text with {{ field }} in it, as Jinja has it",
        "mine.yaml:3: metric=bleu: there is no such field; did you mean metrics?",
        "mine.yaml:5: metrics=blue: there is no such metric; did you mean bleu?",
        f"mine.yaml:5: metrics=accuracy: does not score a task of kind generation; {WORDS}",
        "mine.yaml:5: metrics.chrf.word_order=7: not a value of it; 0, 1 or 2",
        "mine.yaml:5: metrics.chrf.lower=1: there is no such option; word_order or lowercase",
        "mine.yaml:5: metrics=exact_match: is there twice; each once",
        "mine.yaml:6: examples=-1: out of range; an integer, 0 to 2147483647",
        'mine.yaml:7: stop=["x", ""]: not texts to stop at; a list of texts that are not empty, such as ["\\n"]; '
        "[] for none",
        "mine.yaml:8: choices=c: a task of kind generation has none; leave it out",
        'mine.yaml:9: filters=["stripe", {"regex": "("}]: there is no such filter; '
        "strip, first_line or lower, or regex: PATTERN",
        "mine.yaml:10: temperature=warm: not a temperature; 0 (the likeliest token) or above",
        "mine.yaml:11: seed=1.5: not an integer; an integer, 0 to 9223372036854775807",
        "mine.yaml:12: about=3: not text; text, in quotes if YAML takes it for something else",
        "mine.yaml:13: examples_shared=1: not a flag; true or false",
        'mine.yaml:14: settings={"item": 1}: item is the name of the whole record; another name',
    ]


def test_a_kind_asks_for_its_fields() -> None:
    assert lines_of("prompt: x\n") == [
        "mine.yaml: kind=null: missing; generation, multiple_choice, cloze or memorisation"
    ]
    assert lines_of("kind: generation\n") == [
        f"mine.yaml: {field}=null: a task of kind generation needs it; see docs/evaluation.md"
        for field in ("prompt", "target", "metrics")
    ]
    assert lines_of("kind: choose\nmetrics: []\n") == [
        "mine.yaml:1: kind=choose: there is no such choice; generation, multiple_choice, cloze or memorisation"
    ]
    assert lines_of(GOOD.replace("[exact_match]", "[]")) == [
        f"mine.yaml:4: metrics=[]: not a list of metrics; {WORDS}",
    ]
    assert lines_of(CHOOSE.replace("accuracy", "accuracy_unconditional")) == [
        "mine.yaml:5: metrics=accuracy_unconditional: there is no unconditional_prompt; unconditional_prompt: "
        '"Answer:", as Brown et al. 2020'
    ]
    assert lines_of("- a\n") == ["mine.yaml:1: this is a list; a mapping, lines of NAME: VALUE"]
    assert lines_of("kind: a: b\n")[0].startswith("mine.yaml:1: this line is indented deeper")


def test_a_base_is_a_task_and_not_the_file_itself() -> None:
    assert lines_of("base: qas\n")[0] == "mine.yaml:1: base=qas: there is no such task; did you mean qa?"
    assert lines_of("base: [qa]\n") == ['mine.yaml:1: base=["qa"]: not text; the name of a task, or a file NAME.yaml']
    assert lines_of("base: mine.yaml\n") == [
        "mine.yaml:1: base=mine.yaml: is based on this file itself; another task, or no base"
    ]


def test_a_base_lends_what_is_not_said_and_settings_by_name() -> None:
    written(Path("de.yaml"), "base: translation", "settings: {source_language: German, target_language: English}")
    written(Path("en.yaml"), "base: de.yaml", "settings: {target_language: French}", "examples: 2")
    task, shipped = read_task("en.yaml"), read_task("translation")
    assert task.settings == {"source_language": "German", "target_language": "French"}
    assert (task.examples, task.name, task.metrics) == (2, "en", shipped.metrics)
    assert task.place("examples") == "en.yaml:3"
    assert task.place("prompt").endswith("conf/task/translation.yaml:7")


def test_own_tasks_are_found_by_name() -> None:
    Path("conf/task").mkdir(parents=True)
    written(Path("conf/task/mine.yaml"), "base: qa", "data: d.jsonl")
    written(Path("conf/task/qa.yaml"), "base: cloze")
    assert task_names()[:5] == ["arithmetic", "cloze", "memorisation", "mine", "multiple_choice"]
    assert read_task("mine").kind == "cloze", "an own file of a shipped name goes before it"
    assert "task" not in SearchPath.of().group_options()


def test_a_library_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    assert lines_of(GOOD.replace("exact_match", "bleu, rougeL")) == [
        "mine.yaml:4: metrics=bleu: needs sacrebleu, which is not installed; pip install 'megalm[eval]'",
        "mine.yaml:4: metrics=rougeL: needs rouge-score, which is not installed; pip install 'megalm[eval]'",
    ]


def test_data_that_are_missing_or_no_records() -> None:
    right = "JSON Lines, or hf:NAME of a Hugging Face dataset"
    assert lines_of(GOOD, data="no.jsonl") == [f"no.jsonl: there is no such file; {right}"]
    assert lines_of(GOOD, data=".") == [f".: is no file; {right}"]
    assert lines_of(GOOD, "", " ") == ["d.jsonl: has no records; one JSON object a line"]
    assert lines_of(GOOD, {"q": "x", "a": "y"}, "{oops", '{"q": 1, "q": 2}', "[1]") == [
        "d.jsonl:2: malformed JSON; one JSON object a line, in UTF-8",
        "d.jsonl:3: a field twice in one JSON object; one JSON object a line, in UTF-8",
        "d.jsonl:4: JSON that is no object; one JSON object a line, in UTF-8",
    ]
    assert lines_of(GOOD, "[", '{"q": "x"}', "]") == [
        "d.jsonl: a JSON array, not JSON Lines; one record a line: jq -c '.[]' FILE > FILE.jsonl"
    ]
    many = lines_of(GOOD, *["{oops"] * 9)
    assert len(many) == 6
    assert many[-1] == "and 4 more such lines"
    Path("bad.jsonl.gz").write_bytes(gzip.compress(b'{"q": "x"}\n')[:-9])
    assert lines_of(GOOD, data="bad.jsonl.gz")[0].startswith("bad.jsonl.gz: damaged or cut short")
    Path("latin.jsonl").write_bytes('{"q": "é", "a": "e"}\n'.encode("latin-1"))
    assert lines_of(GOOD, data="latin.jsonl") == ["latin.jsonl:1: not UTF-8; one JSON object a line, in UTF-8"]
    Path("binary.jsonl").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert lines_of(GOOD, data="binary.jsonl") == ["binary.jsonl: PNG image; JSON Lines in UTF-8"]


def test_fields_that_are_missing_or_of_another_kind() -> None:
    good = {"q": "x", "a": "y"}
    assert lines_of(GOOD, good, {"q": "x", "b": "y"}) == [
        "d.jsonl:2: target: there is no field a; the record has q and b (task mine)"
    ]
    assert lines_of(GOOD, good, {}) == ["d.jsonl:2: prompt: there is no field q; the record has no fields (task mine)"]
    assert lines_of(GOOD.replace("{{ a }}", "{{ a.text }}"), good) == [
        "d.jsonl:1: target: 'str object' has no attribute 'text'; the record has q and a (task mine)"
    ]
    assert lines_of(GOOD.replace("{{ a }}", "{{ 1 / 0 }}"), good) == [
        "d.jsonl:1: target: does not render (ZeroDivisionError: division by zero); the record has q and a (task mine)"
    ]
    assert lines_of(GOOD, {"q": " \n", "a": "y"}) == [
        "d.jsonl:1: prompt: it is empty; a text of at least one token (task mine)"
    ]
    assert lines_of(GOOD, '{"q": "\\ud800", "a": "y"}')[0].startswith("d.jsonl:1: prompt: holds half of a character")
    references = GOOD + "references: answers.text\n"
    assert lines_of(references, good)[0] == (
        "d.jsonl:1: references: there is no field answers.text; the record has q and a (task mine)"
    )
    assert lines_of(references, {**good, "answers": {"text": [1]}})[0].startswith(
        "d.jsonl:1: references: field answers.text is no list of texts; "
    )
    assert lines_of(GOOD + 'instruction: "{{ language }}"\n', good) == [
        "mine.yaml:5: instruction: there is no field language; the record has no fields"
    ]


def test_templates_run_in_a_sandbox() -> None:
    found = lines_of(GOOD.replace("{{ q }}", "{{ q.__class__.__mro__ }}"), {"q": "x", "a": "y"})
    assert found[0].startswith("d.jsonl:1: prompt: does not render (SecurityError: access to attribute '__class__'")


@pytest.mark.parametrize(
    ("answer_is", "record", "wrong"),
    [
        ("number", {"answer": 3}, "answer=3: names none of the 3 choices; 0 to 2"),
        ("number", {"answer": "B"}, "answer=B: names none of the 3 choices; 0 to 2"),
        ("number", {"answer": -1}, "answer=-1: names none of the 3 choices; 0 to 2"),
        ("number_from_1", {"answer": 0}, "answer=0: names none of the 3 choices; 1 to 3"),
        ("letter", {"answer": "D"}, "answer=D: names none of the 3 choices; A to C"),
        ("text", {"answer": "four"}, "answer=four: names none of the 3 choices; one, two or three"),
        ("number", {"answer": 0, "choices": ["one"]}, "choices: there are 1; at least 2"),
        ("number", {"answer": 0, "choices": ["one", ""]}, "choices: one is empty; texts whose likelihood is asked for"),
        ("number", {"answer": 0, "choices": "ab"}, "choices: field choices is no list of texts; the record has"),
    ],
)
def test_answers_that_name_no_choice(answer_is: str, record: dict, wrong: str) -> None:
    whole = {"q": "x", "choices": ["one", "two", "three"], **record}
    (line,) = lines_of(f"{CHOOSE}answer_is: {answer_is}\n", whole)
    assert line.startswith(f"d.jsonl:1: {wrong}")


@pytest.mark.parametrize(
    ("answer_is", "answer"), [("number", 1), ("number_from_1", "2"), ("letter", "b"), ("text", "two")]
)
def test_answers_are_named_in_four_ways(answer_is: str, answer: object) -> None:
    written(Path("mine.yaml"), CHOOSE, f"answer_is: {answer_is}")
    written(Path("d.jsonl"), json.dumps({"q": "x", "choices": ["one", "two", "three"], "answer": answer}))
    (loaded,) = load_tasks(["mine.yaml"], ["d.jsonl"])
    assert loaded.questions[0].answer == 1
    assert loaded.questions[0].target == "two"


def test_hugging_face_data(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    folder = Path("saved")
    datasets.DatasetDict({"test": datasets.Dataset.from_list([{"q": "x", "a": "y"}])}).save_to_disk(str(folder))
    written(Path("mine.yaml"), GOOD)
    (loaded,) = load_tasks(["mine.yaml"], ["hf:saved"])
    assert loaded.questions[0].item.place == "hf:saved (test) row 0"
    Path("plain").mkdir()
    written(Path("plain/test.jsonl"), '{"q": "x", "a": "z"}')
    (loaded,) = load_tasks(["mine.yaml"], ["hf:plain"])
    assert loaded.questions[0].target == "z"
    assert lines_of(GOOD + "hf_split: dev\n", data="hf:saved")[0].startswith("hf:saved (dev): cannot be loaded: ")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert lines_of(GOOD, data="hf:saved") == ["hf:saved: needs the datasets library; pip install 'megalm[hf]'"]


def test_problems_of_all_tasks_are_said_together() -> None:
    for name, target in (("one", "b"), ("two", "c")):
        written(Path(f"{name}.yaml"), GOOD.replace("{{ a }}", f"{{{{ {target} }}}}"))
    written(Path("d.jsonl"), '{"q": "x", "a": "y"}')
    with pytest.raises(DataError) as refused:
        load_tasks(["one.yaml", "two.yaml"], ["d.jsonl", "d.jsonl"])
    assert [line.partition(";")[0] for line in str(refused.value).splitlines()] == [
        "d.jsonl:1: target: there is no field b",
        "d.jsonl:1: target: there is no field c",
    ]


def test_checking_tasks_imports_no_torch() -> None:
    code = (
        "import sys; import megalm.cli.task_options, megalm.evaluate.tasks.run, megalm.evaluate.tasks.compare; "
        "import megalm.evaluate.tasks.of_config; print('torch' in sys.modules, 'sacrebleu' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "False False\n"


ROOT = Path(__file__).resolve().parents[4]
