"""What a model is asked: tokens at the boundary, examples that fit, and what does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.data.tokenization.tokenizer import Tokenizer
from megalm.errors import ConfigError, DataError
from megalm.evaluate.tasks.data import Item
from megalm.evaluate.tasks.few_shot import ExamplePool
from megalm.evaluate.tasks.load import Changes, LoadedTask, load_tasks
from megalm.evaluate.tasks.prompts import Question
from megalm.evaluate.tasks.requests import prepare_tasks, split
from tests.unit.evaluate.tasks.tiny_models import byte_level, metaspace, written

BYTES, SPACED, BEGUN = byte_level(), metaspace(), byte_level(bos="[CLS]")


def joined(tokenizer: Tokenizer, prompt: str, *continuations: str) -> list[tuple[list[str], list[str]]]:
    names = tokenizer.name_of
    return [
        ([names(n) for n in each.context], [names(n) for n in each.continuation])
        for each in split(tokenizer, prompt, continuations)
    ]


def test_a_space_before_the_answer_is_part_of_its_first_token() -> None:
    assert "Ġcat" in {BYTES.name_of(n) for n in range(BYTES.vocab_size)}
    apart = joined(BYTES, "on the", " cat")
    assert apart[0][1] == ["Ġcat"]
    assert joined(BYTES, "on the ", "cat") == apart, "a space at the prompt's end goes to the answer"
    assert joined(BYTES, "on the  ", "cat")[0][1] == ["Ġ", "Ġcat"]


def test_sentencepiece_gets_no_second_space_at_the_boundary() -> None:
    ((context, answer),) = joined(SPACED, "the cat sat on the", " mat")
    assert "".join(answer) == "▁mat"
    assert "".join(context) == "▁the▁cat▁sat▁on▁the"
    alone = [SPACED.name_of(n) for n in SPACED.encode("mat")]
    glued = joined(SPACED, "the cat sat on the m", "at")
    assert "".join(glued[0][0] + glued[0][1]) == "▁the▁cat▁sat▁on▁the▁mat"
    assert "".join(alone) == "▁mat", "which encoding the answer apart would have put after any prompt"


def test_tokens_that_join_prompt_and_answer_belong_to_the_answer() -> None:
    """ "ca" + "t" is one token of this tokenizer: its likelihood, not that of tokens that no text has."""
    ((context, answer),) = joined(BYTES, "the ca", "t")
    assert answer == ["Ġcat"]
    assert context == [BYTES.name_of(n) for n in BYTES.encode("the")]


def test_all_choices_begin_at_the_token_at_which_the_first_departs() -> None:
    found = joined(BYTES, "the ca", "t", "xyz")
    assert found[0][0] == found[1][0]
    assert "".join(found[0][1]) == "Ġcat"
    assert "".join(found[1][1]) == "Ġcaxyz"


def test_a_document_begins_as_in_training_and_an_empty_context_is_the_end_of_the_one_before() -> None:
    assert joined(BEGUN, "the", " cat")[0][0] == ["[CLS]", "the"]
    assert joined(BEGUN, "", "cat")[0][0] == ["[CLS]"]
    assert joined(BYTES, "", "cat")[0][0] == ["<|endoftext|>"]
    merged = joined(BYTES, "t", "he cat")
    assert merged[0][0] == ["<|endoftext|>"]
    assert "".join(merged[0][1]) == "theĠcat"


@settings(max_examples=100, deadline=None)
@given(st.text("the cat\n.QA:é ", max_size=12), st.lists(st.text("cat he:1\n", min_size=1, max_size=6), min_size=1))
def test_context_and_answer_are_the_tokens_of_the_whole_text(prompt: str, answers: list[str]) -> None:
    for tokenizer in (BYTES, SPACED):
        for answer, request in zip(answers, split(tokenizer, prompt, answers), strict=True):
            whole = [*request.context, *request.continuation]
            encoded = tokenizer.encode(prompt + answer)
            assert whole in (encoded, [tokenizer.eos_id, *encoded])
            assert request.context


CLOZE = """
kind: cloze
prompt: "{{ context }}"
target: "{{ target }}"
metrics: [accuracy]
"""


def cloze(folder: Path, records: list[dict], more: str = "", **changes: int) -> LoadedTask:
    (folder / "mine.yaml").write_text(CLOZE + more)
    data = written(folder / "data.jsonl", *map(json.dumps, records))
    (loaded,) = load_tasks([str(folder / "mine.yaml")], [str(data)], Changes(**changes))
    return loaded


def records(count: int, words: int = 3) -> list[dict]:
    return [{"context": f"item {n}" + " cat" * words, "target": "mat"} for n in range(count)]


def drawn(loaded: LoadedTask, count: int) -> dict[int, list[int]]:
    return {q.item.number: [e.item.number for e in loaded.pool.examples(q, count)] for q in loaded.questions}


def test_examples_depend_on_seed_and_item_alone(tmp_path: Path) -> None:
    all_of_them = drawn(cloze(tmp_path, records(40), examples=4, seed=1), 4)
    some = drawn(cloze(tmp_path, records(40), examples=4, seed=1, limit=7), 4)
    assert some == {n: all_of_them[n] for n in range(7)}, "not on how many are asked"
    assert all(n not in examples and len(set(examples)) == 4 for n, examples in all_of_them.items())
    fewer = drawn(cloze(tmp_path, records(40), examples=2, seed=1), 2)
    assert all(all_of_them[n][:2] == examples for n, examples in fewer.items()), "k are the first of more"
    assert drawn(cloze(tmp_path, records(40), examples=4, seed=2), 4) != all_of_them
    assert all_of_them[0] == [34, 15, 13, 12], "frozen: results of today can be had again"
    uses = [n for examples in all_of_them.values() for n in examples]
    assert len(set(uses)) > 35, "each item has a draw of its own"


def test_shared_examples_are_the_same_for_all_but_those_that_are_among_them(tmp_path: Path) -> None:
    found = drawn(cloze(tmp_path, records(30), "examples_shared: true\n", examples=3), 3)
    commonest = max(map(tuple, found.values()), key=[*map(tuple, found.values())].count)
    others = {n for n, examples in found.items() if tuple(examples) != commonest}
    assert others == set(commonest)
    for n in others:
        assert [e for e in found[n][:2] if e != n] == [e for e in commonest if e != n][:2]


def test_an_item_is_left_out_by_what_it_asks_not_by_its_place(tmp_path: Path) -> None:
    twice = [{"context": "same", "target": "one"}, {"context": "same", "target": "two"}, *records(2)]
    found = drawn(cloze(tmp_path, twice, examples=2), 2)
    assert set(found[0]) == set(found[1]) == {2, 3}
    assert all(len({n for n in examples if n < 2}) == 1 for n, examples in found.items() if n > 1)
    train = written(tmp_path / "train.jsonl", *map(json.dumps, [*twice[:1], *records(4)]))
    other = drawn(cloze(tmp_path, twice, f"examples_data: {train}\n", examples=4), 4)
    assert all(0 not in other[n] for n in (0, 1)), "an example of another file asks the same"


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 60), st.integers(0, 2**63 - 1))
def test_a_draw_is_a_permutation(size: int, seed: int) -> None:
    questions = [Question(Item(number, "", {}), f"prompt {number}", "target") for number in range(size)]
    other = Question(Item(0, "", {}), "another prompt", "target")
    found = ExamplePool(questions, seed=seed, shared=False).examples(other, size)
    assert sorted(each.item.number for each in found) == list(range(size))


def test_too_few_examples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        cloze(tmp_path, records(4), examples=4)
    assert str(refused.value) == (
        f"{tmp_path}/mine.yaml: examples=4: {tmp_path}/data.jsonl, the item itself left out, has 3 different ones; "
        "at most 3"
    )


def test_examples_are_dropped_from_the_left_until_the_prompt_fits(tmp_path: Path) -> None:
    loaded = cloze(tmp_path, records(10), examples=6)
    (roomy,) = prepare_tasks([loaded], BYTES, 10_000)
    assert [each.dropped for each in roomy.asked] == [0] * 10
    assert roomy.notes() == []
    (tight,) = prepare_tasks([loaded], BYTES, 60)
    whole = roomy.asked[0].prompt.split("\n\n")
    asked = tight.asked[0]
    assert 0 < asked.dropped < 6
    assert asked.prompt.split("\n\n") == whole[asked.dropped :]
    assert asked.examples == roomy.asked[0].examples[asked.dropped :]
    for each, before in zip(tight.asked, roomy.asked, strict=True):
        one_more = before.prompt.split("\n\n")[each.dropped - 1 :]
        assert len(BYTES.encode("\n\n".join(one_more) + " mat")) > 61, "no more than needed are dropped"
    lengths = [len(each.score[0].context) + len(each.score[0].continuation) for each in tight.asked]
    assert max(lengths) <= 61
    dropped = sum(each.dropped for each in tight.asked)
    assert tight.notes() == [f"mine: 10 items have fewer examples, to fit: {dropped} dropped"]


def test_an_item_that_does_not_fit_is_refused_with_its_line_or_cut_and_counted(tmp_path: Path) -> None:
    items = [*records(2), {"context": "a long one" + " cat" * 50, "target": "mat"}]
    loaded = cloze(tmp_path, items)
    with pytest.raises(DataError) as refused:
        prepare_tasks([loaded], BYTES, 40)
    tokens = len(BYTES.encode("a long one" + " cat" * 50))
    assert str(refused.value) == (
        f"{tmp_path}/data.jsonl:3: prompt: it has {tokens} tokens, and {len(BYTES.encode(' mat'))} of the answer; the "
        "model's sequences have 40; a model of longer sequences, fewer new tokens, or too_long: cut (task mine)"
    )
    (cut,) = prepare_tasks([cloze(tmp_path, items, "too_long: cut\n")], BYTES, 40)
    request = cut.asked[2].score[0]
    assert len(request.context) + len(request.continuation) == 41
    assert request.context == tuple(BYTES.encode("a long one" + " cat" * 50))[-len(request.context) :]
    assert cut.notes() == [f"mine: 1 prompts are cut at their beginning, to fit: {cut.asked[2].cut} tokens"]


def test_a_prompt_to_be_continued_leaves_room_and_ends_where_the_answer_begins(tmp_path: Path) -> None:
    data = written(tmp_path / "d.jsonl", *(json.dumps({"q": f"item {n}", "a": "mat"}) for n in range(5)))
    task = 'kind: generation\nprompt: "{{ q }}"\ntarget: "{{ a }}"\nmetrics: exact_match\nmax_new_tokens: 20\n'
    for separator, end in ((" ", ""), ("\\n", "\n"), ("\\n ", "\n"), ("", "")):
        (tmp_path / "g.yaml").write_text(f'{task}separator: "{separator}"\nexamples: 1\n')
        loaded = load_tasks([str(tmp_path / "g.yaml")], [str(data)])
        (prepared,) = prepare_tasks(loaded, BYTES, 64)
        asked = prepared.asked[0]
        assert asked.prompt.endswith(f"item 0{end}")
        assert asked.generate is not None
        assert asked.generate.tokens == tuple(BYTES.encode_prompt(asked.prompt))
        assert prepared.requests == 5
    with pytest.raises(DataError, match=r"d.jsonl:1: prompt: it has \d+ tokens, and max_new_tokens=20 to come; "):
        prepare_tasks(loaded, BYTES, 21)
