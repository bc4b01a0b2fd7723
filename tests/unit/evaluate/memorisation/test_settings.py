"""Files of tasks that ask for what a run has read: what is in them, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from megalm.errors import ConfigError
from megalm.evaluate.memorisation.settings import FIELDS, Memorisation, read_memorisation
from megalm.evaluate.tasks.task_file import BASE, read_fields, read_task

DOCS = Path(__file__).resolve().parents[4] / "docs" / "evaluation.md"


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read(text: str) -> Memorisation:
    Path("mine.yaml").write_text(text, encoding="utf-8")
    return read_memorisation(read_fields("mine.yaml"))


def test_the_shipped_task_has_the_defaults() -> None:
    found = read_memorisation(read_fields("memorisation"))
    default = Memorisation(name="memorisation", places=found.places, about=found.about)
    assert found == default and found.about


def test_a_file_takes_over_the_shipped_one() -> None:
    found = read("base: memorisation\nprompt_tokens: [16, 4, 16]\ndocuments: planted\n")
    assert (found.name, found.prompt_tokens, found.passage_tokens) == ("mine", (4, 16), 48)
    assert (found.documents, found.continuation_tokens) == ("planted", 32)
    assert read("base: memorisation\nprompt_tokens: 7\n").prompt_tokens == (7,)
    changed = found.changed(limit=5, seed=None)
    assert (changed.limit, changed.seed) == (5, 1234)


def test_everything_that_is_wrong_is_said_with_its_line() -> None:
    with pytest.raises(ConfigError) as refused:
        read(
            "kind: memorisation\nprompt_tokens: [0, 8]\ncontinuation_tokens: many\nlimits: 3\nworst: -1\n"
            "metrics: [f1]\ndocuments: ' '\nseed: null\n"
        )
    assert refused.value.lines == [
        "mine.yaml:2: prompt_tokens=[0, 8]: out of range; an integer, 1 to 2147483647",
        "mine.yaml:3: continuation_tokens=many: not an integer; an integer, 1 to 2147483647",
        "mine.yaml:4: limits=3: a task of kind memorisation has no such field; did you mean limit?",
        "mine.yaml:5: worst=-1: out of range; an integer, 0 to 2147483647",
        'mine.yaml:6: metrics=["f1"]: a task of kind memorisation has no such field; '
        "kind, about, prompt_tokens, continuation_tokens, documents, limit, worst, seed and base",
        "mine.yaml:7: documents= : empty; text",
        "mine.yaml:8: seed=null: not an integer; an integer, 0 to 9223372036854775807",
    ]
    with pytest.raises(ConfigError, match=r"prompt_tokens=\[\]: not lengths; a list of numbers of tokens"):
        read("kind: memorisation\nprompt_tokens: []\n")


def test_passages_longer_than_a_sequence_are_refused_with_what_fits() -> None:
    found = read("base: memorisation\n")
    found.check_length(64)
    with pytest.raises(ConfigError) as refused:
        found.check_length(48)
    assert str(refused.value).partition("prompt_tokens=")[2] == (
        "[8, 16, 32]: prompt and continuation_tokens=32 are 64 tokens, more than model.sequence_length=48; "
        "at most 16: a task file of your own with base: mine"
    )
    with pytest.raises(ConfigError, match="fewer, and continuation_tokens below 32: a task file"):
        found.check_length(32)


def test_where_other_tasks_are_asked_it_is_refused() -> None:
    with pytest.raises(ConfigError) as refused:
        read_task("memorisation", asked_by="evaluate.tasks")
    assert str(refused.value) == (
        "evaluate.tasks=memorisation: asks a trained model for what the run has read until then; "
        "megalm evaluate RUN --task memorisation, after training"
    )


def test_a_home_folder_that_is_not_there_is_a_line() -> None:
    with pytest.raises(ConfigError, match=r"^--task=~nobody-here/x\.yaml: there is no home folder of 'nobody-here'"):
        read_fields("~nobody-here/x.yaml")


def test_the_docs_name_every_field() -> None:
    page = DOCS.read_text(encoding="utf-8")
    section = page[page.index("## Memorisation") :]
    for field in (*FIELDS, BASE):
        assert f"`{field}`" in section or f"`{field}:" in section
