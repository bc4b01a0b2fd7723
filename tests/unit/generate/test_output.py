"""A file of completions: in order, resumed after an interruption, never mixed with another's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megalm.errors import ConfigError
from megalm.generate.output import WRITTEN, as_objects, output_file
from megalm.generate.requests import Completion, TokenProbability

MADE_BY = {"weights": "a", "seed": 1}


def _done(number: int, samples: int = 1) -> list[dict]:
    made = [Completion(tokens=(number, each), text=f"t{number}", finish="length") for each in range(samples)]
    return as_objects({"prompt": f"p{number}"}, made)


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_objects_are_in_the_order_of_the_prompts(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with output_file(path, MADE_BY, prompts=3, samples=1) as file:
        for number in (2, 0, 1):
            file.add(number, _done(number))
    assert [each["prompt"] for each in _lines(path)] == ["p0", "p1", "p2"]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["out.jsonl"]
    with (
        pytest.raises(ConfigError, match=r"out\.jsonl: exists; another name, or delete it"),
        output_file(path, MADE_BY, prompts=3, samples=1),
    ):
        pass


def test_an_interrupted_file_goes_on_behind_its_last_whole_prompt(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt), output_file(path, MADE_BY, prompts=3, samples=2) as file:
        file.add(0, _done(0, 2))
        raise KeyboardInterrupt
    part = tmp_path / "out.jsonl.part"
    whole = part.read_text()
    part.write_text(whole + json.dumps(_done(1, 2)[0]) + '\n{"prompt": "p1", "te')  # one sample, and half of another
    with output_file(path, MADE_BY, prompts=3, samples=2) as file:
        assert file.done == 1
        assert part.read_text() == whole
        file.add(1, _done(1, 2))
        file.add(2, _done(2, 2))
    assert [(each["prompt"], each["sample"]) for each in _lines(path)] == [
        (f"p{n}", s) for n in range(3) for s in (0, 1)
    ]


def test_a_part_made_otherwise_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt), output_file(path, MADE_BY, prompts=2, samples=1) as file:
        file.add(0, _done(0))
        raise KeyboardInterrupt
    before = (tmp_path / "out.jsonl.part").read_text()
    with (
        pytest.raises(ConfigError, match=r"made with other settings \(seed 1 → 2\)"),
        output_file(path, {**MADE_BY, "seed": 2}, prompts=2, samples=1),
    ):
        pass
    assert (tmp_path / "out.jsonl.part").read_text() == before


def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with (
        output_file(path, MADE_BY, prompts=2, samples=1) as file,
        pytest.raises(ConfigError, match="another process writes it"),
    ):
        file.add(0, _done(0))
        with output_file(path, MADE_BY, prompts=2, samples=1):
            pass


def test_every_field_that_is_written_is_known_to_be() -> None:
    told = (TokenProbability(log_probability=-1.0, alternatives=((3, -1.0),)),)
    completion = Completion(tokens=(3,), text="a", finish="end", probabilities=told, score=-1.0)
    assert {name for made in as_objects({}, [completion] * 2) for name in made} == WRITTEN
