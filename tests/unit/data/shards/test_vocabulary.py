"""Two tokenizers are told to be the same, one the other with tokens added, or different, by what ids they give."""

from __future__ import annotations

import json

import pytest
import tokenizers
from tokenizers import AddedToken, models, pre_tokenizers

from megalm.data.shards.vocabulary import Relation, Vocabulary, added_tokens, beyond, check_same, relation
from megalm.data.tokenization.tokenizer import Tokenizer
from megalm.data.tokenization.training import train_byte_level_bpe, train_wordpiece
from megalm.errors import DataError

TEXTS = ["the cat sat on the mat", "a hat, a cat and a mat"] * 4
MARKS = ["<|im_start|>", "<|im_end|>"]


def with_tokens(definition: str, tokens: list[str | AddedToken]) -> str:
    tokenizer = tokenizers.Tokenizer.from_str(definition)
    tokenizer.add_special_tokens(tokens)
    return str(tokenizer.to_str())


def unigram() -> str:
    pieces = [("<unk>", 0.0), ("▁the", -1.0), ("▁", -2.0), *((letter, -3.0) for letter in "abcdefghijklmnop")]
    tokenizer = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens(["<unk>"])
    return str(tokenizer.to_str())


DEFINITIONS = {
    "bpe": train_byte_level_bpe(TEXTS, 290).definition,
    "wordpiece": train_wordpiece(TEXTS, 130).definition,
    "unigram": unigram(),
}


def compare(old: str, new: str) -> Relation:
    return relation(Vocabulary.parse(old, "old"), Vocabulary.parse(new, "new"))


@pytest.mark.parametrize("kind", DEFINITIONS)
def test_tokens_that_were_added_are_told_from_a_change(kind: str) -> None:
    old = DEFINITIONS[kind]
    grown = with_tokens(old, MARKS)
    assert compare(old, old) is Relation.SAME
    assert compare(old, grown) is Relation.GROWN
    assert compare(grown, old) is Relation.OTHER, "ids that the model was trained with are gone"
    one, other = Vocabulary.parse(old, "old"), Vocabulary.parse(grown, "new")
    assert added_tokens(one, other) == tuple(MARKS)
    assert other.size == one.size + 2
    assert beyond(other, one.size) == ([], MARKS)
    swapped = with_tokens(old, MARKS[::-1])
    assert compare(grown, swapped) is Relation.OTHER


def test_what_does_not_change_an_id_does_not_matter() -> None:
    old = DEFINITIONS["bpe"]
    parts = json.loads(old)
    assert compare(old, json.dumps(parts, indent=3)) is Relation.SAME
    merged = parts["model"] | {"merges": [" ".join(pair) for pair in parts["model"]["merges"]]}
    assert compare(old, json.dumps(parts | {"model": merged})) is Relation.SAME, "as older files spell merges"
    tokenizer = tokenizers.Tokenizer.from_str(old)
    tokenizer.enable_truncation(8)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    assert compare(old, tokenizer.to_str()) is Relation.SAME


def test_what_changes_an_id_is_another_tokenizer() -> None:
    old = DEFINITIONS["bpe"]
    retrained = train_byte_level_bpe(TEXTS, 292, MARKS).definition
    assert compare(old, retrained) is Relation.OTHER, "marks that were trained in have moved every id"
    tokenizer = tokenizers.Tokenizer.from_str(old)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert compare(old, tokenizer.to_str()) is Relation.OTHER
    word = next(token for token in json.loads(old)["model"]["vocab"] if len(token) > 2 and token[0] != "<")
    assert compare(old, with_tokens(old, [word])) is Relation.OTHER, "a word that is cut out of text now"
    parts = json.loads(old)
    parts["model"]["merges"] = parts["model"]["merges"][1:]
    assert compare(old, json.dumps(parts)) is Relation.OTHER
    scores = json.loads(DEFINITIONS["unigram"])
    scores["model"]["vocab"][1][1] = -9.0
    assert compare(DEFINITIONS["unigram"], json.dumps(scores)) is Relation.OTHER


def test_a_hash_alone_is_compared_as_such() -> None:
    tokenizer = Tokenizer(DEFINITIONS["bpe"])
    known = Vocabulary.of(tokenizer, "a/tokenizer.json")
    recorded = Vocabulary("the record", 290, tokenizer.sha256)
    assert relation(recorded, known) is Relation.SAME
    assert relation(recorded, Vocabulary.parse(DEFINITIONS["wordpiece"], "b")) is Relation.OTHER


def test_the_refusal_names_both_and_what_helps() -> None:
    model = Vocabulary.parse(DEFINITIONS["bpe"], "run/tokenizer.json")
    grown = Vocabulary.parse(with_tokens(DEFINITIONS["bpe"], MARKS), "data/tokenizer.json")
    other = Vocabulary.parse(DEFINITIONS["wordpiece"], "data/tokenizer.json")
    check_same(model, model, "data.path=data", "so nothing")
    check_same(grown, model, "data.path=data", "so nothing")  # data from before the tokens were added
    with pytest.raises(DataError) as error:
        check_same(model, other, "data.path=data", "so its perplexity would mean nothing")
    assert str(error.value) == (
        "data.path=data: made by another tokenizer than the model's, so its perplexity would mean nothing: "
        f"{other}, not {model}; prepare the text again with --tokenizer run/tokenizer.json"
    )
    assert str(model) == f"run/tokenizer.json ({model.size} tokens, sha256 {model.sha256[:12]})"
    with pytest.raises(DataError, match=r"2 tokens added \(<\|im_start\|>, <\|im_end\|>\).*extend_vocab=true"):
        check_same(model, grown, "data.path=data", "so nothing")
