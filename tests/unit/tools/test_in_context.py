"""The text of the experiment on in-context learning: what is asked for is kept out, and examples tell something."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from megalm.data.tokenization.training import train_byte_level_bpe
from megalm.evaluate.tasks.load import load_tasks

TOOL = Path(__file__).resolve().parents[3] / "tools" / "in_context.py"
ASKED = [(98, 45), (7, 7), (10, 3)]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("in_context", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["in_context"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def written(tool: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("in_context")
    lines = [
        json.dumps({"context": f"\n\nQ: What is {a} plus {b}?\n\nA:", "completion": f" {a + b}"}) for a, b in ASKED
    ]
    (folder / "gpt3.jsonl").write_text("\n".join(lines) + "\n")
    arguments = ["--questions", str(folder / "gpt3.jsonl"), "--out", str(folder / "out"), "--documents", "4000"]
    assert tool.main(arguments) == 0
    return folder / "out"


def documents(folder: Path) -> list[list[tuple[int, int, int]]]:
    texts = [json.loads(line)["text"] for line in (folder / "text.jsonl").read_text().splitlines()]
    lines = [[re.split("[#=]", line) for line in text.split("\n")] for text in texts]
    return [[(int(a), int(b), int(c)) for a, b, c in document] for document in lines]


def test_no_pair_that_is_asked_for_is_in_the_text_in_either_order(written: Path) -> None:
    pairs = {(a, b) for document in documents(written) for a, b, _ in document}
    assert len(pairs) > 9_000
    assert not pairs & {*ASKED, *((b, a) for a, b in ASKED)}


def test_each_document_has_one_operation_and_lines_of_several_could_be_of_any(tool: ModuleType, written: Path) -> None:
    found: Counter[str] = Counter()
    for document in documents(written):
        names = [
            n for n, (operation, _) in tool.OPERATIONS.items() if all(operation(a, b) == c for a, b, c in document)
        ]
        assert len(names) == 1
        found.update(names)
    weights = {name: weight for name, (_, weight) in tool.OPERATIONS.items()}
    for name, weight in weights.items():
        assert found[name] / 4000 == pytest.approx(weight / sum(weights.values()), abs=0.03)
    assert found["sum"] < found["first"], "the sum is no good guess without examples"


def test_the_task_asks_as_the_text_is_written_and_digits_are_single_tokens(written: Path) -> None:
    (task,) = load_tasks([str(written / "unnamed_addition.yaml")])
    assert [(each.prompt, each.target) for each in task.questions] == [
        ("98#45=", "143"),
        ("07#07=", "014"),
        ("10#03=", "013"),
    ]
    tokenizer = train_byte_level_bpe(["98#45=143\n7#7=14\n"] * 50, 257)
    assert [tokenizer.decode([token]) for token in tokenizer.encode("98#45=143\n")] == list("98#45=143\n")


def test_what_is_no_question_is_said_with_its_line(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "q.jsonl").write_text('{"context": "Q: What is 9 plus 8?"}\n{"context": "Q: What is 9 minus 8?"}\n')
    assert tool.main(["--questions", str(tmp_path / "q.jsonl"), "--out", str(tmp_path / "out")]) == 3
    assert "q.jsonl: line 2: no question such as What is 98 plus 45?" in capsys.readouterr().err
    (tmp_path / "q.jsonl").write_text('{"context": "Q: What is 9 plus 8?"}\n')
    assert tool.main(["--questions", str(tmp_path / "q.jsonl"), "--out", str(tmp_path)]) == 2
    assert "exists; a new folder" in capsys.readouterr().err
