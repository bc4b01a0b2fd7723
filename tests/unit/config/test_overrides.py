"""Values as they are typed: text arrives as it stands, numbers, null, lists and references keep their meaning."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from megalm.config.check import violations
from megalm.config.compose import compose
from megalm.config.overrides import Reader, split_at_commas
from megalm.config.parse import config_from_dict
from megalm.config.schema import Config, Run
from tests.unit.config.random_invalid import SOUND, nested

LIKELY = "abz09 .,:;=+-_~@#$%&*(){}[]<>|\\/'\"`?!^\t\näß训练ی\u200c\U0001f600"
WITHIN_LISTS = "".join(sign for sign in LIKELY if sign not in ",[]")
TEXT = st.one_of(st.text(max_size=40), st.text(LIKELY, max_size=40))


def arrives(field: str, text: str) -> Any:
    reader = Reader({})
    reader.read(f"{field}={text}")
    assert reader.problems == []
    (setting,) = reader.settings
    assert (setting.key, setting.is_group) == (field, False)
    return setting.value


def keeps_its_meaning(text: str) -> bool:
    """What is no plain text: null, references, and text that is quoted already."""
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text.lower() != "null" and "${" not in text and not quoted


def is_legal(config: Config) -> bool:
    return violations(config, 1) == []


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(TEXT)
def test_any_text_arrives_unchanged(text: str) -> None:
    assume(keeps_its_meaning(text))
    assert arrives("run.name", text) == text
    assert arrives("report.prompt", text) == text
    if not (text.startswith("[") and text.endswith("]")):
        assert arrives("data.path", text) == text


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(TEXT)
def test_quotes_take_what_has_a_meaning_otherwise(text: str) -> None:
    """In quotes, with backslashes as Hydra wants them, ``null`` and ``'x'`` are text, too."""
    assume("\\" not in text)  # Hydra takes backslashes before a quote in pairs alone
    quoted = '"' + text.replace('"', '\\"') + '"'
    assert arrives("run.name", quoted) == text
    assert arrives("data.path", quoted) == text


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.text(WITHIN_LISTS, max_size=12), min_size=1, max_size=4))
def test_lists_of_texts_arrive_item_by_item(items: list[str]) -> None:
    assume(all(item == item.strip() and item and keeps_its_meaning(item) and item[0] not in "'\"" for item in items))
    assert arrives("data.path", f"[{','.join(items)}]") == items


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(TEXT, TEXT)
def test_every_legal_name_and_path_is_composed_as_it_was_typed(name: str, path: str) -> None:
    sound = config_from_dict(nested(SOUND))
    if not is_legal(replace(sound, run=Run(name=name))):
        name = f"x{''.join(sign for sign in name if sign.isalnum())[:40]}"
    if path[:1] == "~" or not is_legal(replace(sound, data=replace(sound.data, path=(path,)))) or "{file}" in path:
        path = f"data/{''.join(sign for sign in path if sign not in chr(0) and sign.isprintable())}"
    assume(keeps_its_meaning(name) and keeps_its_meaning(path) and not path.startswith("["))
    config = compose(["experiment=quickstart", f"run.name={name}", f"data.path={path}", f"run.dir={path}"])
    assert (config.run.name, config.data.path, config.run.dir) == (name, (path,), path)


@pytest.mark.parametrize(
    "text",
    [
        "hf:~/m",
        "C:\\x",
        "a=b",
        "it's",
        "{x}",
        "(1)",
        "50%",
        'say("hi"), [1',
        "a,b",
        "007",
        "1e3",
        "true",
        "x y",
        "训练",
    ],
)
def test_the_values_that_people_type(text: str) -> None:
    fields = ("report.prompt", "data.path", "checkpoint.init_from")
    config = compose(["experiment=quickstart", *(f"{field}={text}" for field in fields)])
    assert (config.report.prompt, config.data.path, config.checkpoint.init_from) == (text, (text,), text)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.steps=1e3", 1000.0),
        ("train.steps=-3", -3),
        ("model.bias=false", False),
        ("model.num_kv_heads=null", None),
        ("report.prompt=NULL", None),
        ("parallel.stage_layers=[1,2]", [1, 2]),
        ("data.weights=[0.5, 2]", [0.5, 2]),
        ("data.path=[a b, hf:~/m, it's, 'x,y', \"'\"]", ["a b", "hf:~/m", "it's", "x,y", "'"]),
        ("data.path=[]", []),
        ("run.seed=${model.num_layers}", "${model.num_layers}"),
        ("run.name='007'", "007"),
        ("run.name=", ""),
        ("train.steps=it's", "it's"),
    ],
)
def test_what_has_a_meaning_keeps_it(override: str, value: Any) -> None:
    field, _, text = override.partition("=")
    assert arrives(field, text) == value


def test_items_between_commas() -> None:
    assert split_at_commas("a, b ,c") == ["a", "b", "c"]
    assert split_at_commas("'a,b',\"c,d\"") == ["'a,b'", '"c,d"']
    assert split_at_commas("[a,b],c,[d]") == ["[a,b]", "c", "[d]"]
    assert split_at_commas("${oc.env:X,y},it's") == ["${oc.env:X,y}", "it's"]
    assert split_at_commas("") == [""] and split_at_commas("a,,") == ["a", "", ""]
