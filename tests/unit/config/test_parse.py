from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megalm.config.parse import config_from_dict, config_to_dict, default_dict, field_paths
from megalm.config.violation import Violation, format_value
from megalm.errors import ConfigError, ExitCode
from tests.unit.config.random_invalid import SOUND, nested


def problems(**changes: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config_from_dict(nested({**SOUND, **{path.replace("__", "."): value for path, value in changes.items()}}))
    assert caught.value.exit_code == ExitCode.BAD_CONFIG
    return caught.value.lines


def test_round_trip() -> None:
    config = config_from_dict(nested(SOUND))
    assert config_from_dict(config_to_dict(config)) == config
    assert config.parallel.tp == 2 and config.model.position == "learned"


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the first draw of any text loads tables
@given(st.data())
def test_round_trip_of_any_values(data: st.DataObject) -> None:
    values = dict(SOUND)
    text = st.text().filter(lambda value: value != "???" and value[:1] != "~")  # unset, and the home folder of a path
    by_type = {
        int: st.integers(-(2**70), 2**70),
        float: st.floats(allow_nan=False, allow_infinity=False),
        bool: st.booleans(),
        str: text,
        tuple[str, ...]: st.lists(text, min_size=1),
        tuple[int, ...]: st.lists(st.integers(-(2**70), 2**70), min_size=1),
        tuple[float, ...]: st.lists(st.floats(allow_nan=False, allow_infinity=False)),
    }
    for path, kind in field_paths().items():
        if kind in by_type and data.draw(st.booleans()):
            values[path] = data.draw(by_type[kind])
    config = config_from_dict(nested(values))
    assert config_from_dict(config_to_dict(config)) == config
    mapping = config_to_dict(config)
    for path, value in values.items():
        section, name = path.split(".")
        assert mapping[section][name] == (list(value) if isinstance(value, tuple) else value)


def test_integral_numbers_convert_and_nothing_else_does() -> None:
    config = config_from_dict(nested({**SOUND, "train.steps": 1e3, "optim.lr": 1}))
    assert config.train.steps == 1000 and isinstance(config.train.steps, int)
    assert config.optim.lr == 1.0 and isinstance(config.optim.lr, float)
    assert problems(train__steps=1.5) == ["train.steps=1.5: this is no integer; an integer"]
    assert problems(train__steps=True) == ["train.steps=true: this is true or false; an integer"]
    assert problems(train__steps="10") == ["train.steps=10: this is text; an integer"]
    assert problems(optim__lr=False) == ["optim.lr=false: this is true or false; a finite number"]
    assert problems(model__bias=1) == ["model.bias=1: this is an integer; true or false"]
    assert problems(run__name=7) == ["run.name=7: this is an integer; text"]
    assert problems(model__num_kv_heads="x") == ["model.num_kv_heads=x: this is text; an integer or null"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 10**400])
def test_numbers_are_finite(value: float) -> None:
    (line,) = problems(optim__lr=value)
    assert line.startswith("optim.lr=") and line.endswith("; a finite number")


def test_all_problems_are_reported_at_once() -> None:
    mapping: dict[Any, Any] = nested(SOUND)
    mapping["model"] |= {"num_layer": 3, "bias": "yes"}
    mapping["paralel"] = {"tp": 2}
    mapping["train"] = 5
    mapping[3] = 4
    del mapping["optim"]
    with pytest.raises(ConfigError) as caught:
        config_from_dict(mapping)
    assert set(caught.value.lines) >= {
        "model.num_layer=3: there is no such field; did you mean model.num_layers?",
        "model.bias=yes: this is text; true or false",
        'paralel={"tp": 2}: there is no such field; did you mean parallel?',
        "optim.lr=???: a value is required; a finite number",
    }
    assert any(line.startswith("train=5: not a mapping; ") for line in caught.value.lines)
    assert any(line.startswith("3=4: there is no such field; the sections are run, ") for line in caught.value.lines)
    assert len(caught.value.lines) == 6


def test_a_field_in_the_wrong_section_is_found() -> None:
    assert problems(optim__micro_batch_size=4) == [
        "optim.micro_batch_size=4: there is no such field; did you mean train.micro_batch_size?"
    ]


def test_what_is_no_mapping_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match="not a mapping"):
        config_from_dict([])  # type: ignore[arg-type]


def test_defaults_of_the_schema_name_every_field() -> None:
    defaults = default_dict()
    assert {f"{section}.{name}" for section in defaults for name in defaults[section]} == set(field_paths())
    assert defaults["model"]["num_layers"] == "???"
    assert defaults["parallel"]["tp"] == 1


def test_values_are_spelt_on_one_line() -> None:
    assert format_value(None) == "null"
    assert format_value("a\nb") == '"a\\nb"'
    assert len(format_value("x" * 500)) == 60
    assert format_value({"a": [1, None, "x"]}) == '{"a": [1, null, "x"]}'
    assert "\n" not in str(Violation("a.b", "x\ny", "wrong", "right"))


def test_values_are_spelled_out_as_far_as_they_fit() -> None:
    lists, mappings = ["a"], {"a": 1}
    for _ in range(64):
        lists, mappings = [lists, lists], {"x": mappings, "y": mappings}
    lists.append(lists)
    assert format_value(lists) == "[[[...], [...]], [[...], [...]], [[...], [...], [...]]]"
    assert format_value(mappings).startswith('{"x": {"x": {...}')
    assert format_value(SimpleNamespace(x=lists)) == "<SimpleNamespace>"
    assert format_value([1 << 10**6]) == "[<int of 1000001 bits>]"
