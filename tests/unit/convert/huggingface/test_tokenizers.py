"""A model's tokenizer goes with it: the library encodes as megalm does, and megalm as the library did."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
from foreign_models import BERT, DISTILBERT, GPT2, ROBERTA, convert_quietly, write_random_run

from megalm.data.tokenization.tokenizer import Tokenizer
from megalm.data.tokenization.training import train_byte_level_bpe, train_wordpiece
from megalm.errors import CheckpointError
from megalm.generate.run import run_generate

TEXT = "It's 7 o'clock; naïve ☃ snowmen don't know.\n\n\tdef f(x): return x**2  # twice"
EMPTY = '{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}'
CORPUS = [TEXT, "Snowmen know of the clock, and of twice two.", "def g(y): return y"]


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_byte_level_bpe(CORPUS, 300, ["<|im_start|>"])


@pytest.fixture(scope="module")
def wordpiece() -> Tokenizer:
    return train_wordpiece(CORPUS * 3, 160, lowercase=True)


def test_the_librarys_tokenizer_gives_megalms_ids(bpe: Tokenizer, wordpiece: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for name, tokenizer, model in (("bpe", bpe, GPT2), ("wordpiece", wordpiece, BERT)):
        run = tmp_path / name
        write_random_run(run, replace(model, vocab_size=tokenizer.vocab_size), tokenizer=tokenizer)
        convert_quietly("megalm", "hf", run, tmp_path / f"{name}-hf")
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / f"{name}-hf")
        assert theirs(TEXT, add_special_tokens=False).input_ids == tokenizer.encode(TEXT)
        start, end = (list(tokenizer.before_ids), [tokenizer.eos_id]) if name == "wordpiece" else ([], [])
        assert theirs(TEXT).input_ids == [*start, *tokenizer.encode(TEXT), *end]
        assert theirs.eos_token_id == tokenizer.eos_id
        assert theirs.model_max_length == model.sequence_length
        assert len(theirs) == tokenizer.vocab_size
        assert theirs.decode(tokenizer.encode(TEXT)) == tokenizer.decode(tokenizer.encode(TEXT))
        assert theirs.mask_token_id == tokenizer.mask_id
        config = transformers.AutoConfig.from_pretrained(tmp_path / f"{name}-hf")
        if model.causal:
            assert (config.bos_token_id, config.eos_token_id) == (None, tokenizer.eos_id), "nothing begins its texts"
            assert theirs.bos_token is None
            generation = transformers.GenerationConfig.from_pretrained(tmp_path / f"{name}-hf")
            assert generation.eos_token_id == tokenizer.eos_id
        else:
            assert config.pad_token_id == theirs.pad_token_id == tokenizer.special_tokens["[PAD]"]


def test_only_models_with_token_types_are_given_them(bpe: Tokenizer, wordpiece: Tokenizer, tmp_path: Path) -> None:
    names = {}
    for name, tokenizer, model in (("bpe", bpe, GPT2), ("wordpiece", wordpiece, BERT)):
        run = tmp_path / name
        write_random_run(run, replace(model, vocab_size=tokenizer.vocab_size), tokenizer=tokenizer)
        convert_quietly("megalm", "hf", run, tmp_path / f"{name}-hf")
        settings = json.loads((tmp_path / f"{name}-hf" / "tokenizer_config.json").read_text())
        names[name] = settings["model_input_names"]
    assert names["bpe"] == ["input_ids", "attention_mask"]
    assert names["wordpiece"] == ["input_ids", "token_type_ids", "attention_mask"]


def test_a_tokenizer_survives_the_round_trip(bpe: Tokenizer, wordpiece: Tokenizer, tmp_path: Path) -> None:
    for name, tokenizer, model in (("bpe", bpe, GPT2), ("wordpiece", wordpiece, BERT)):
        write_random_run(tmp_path / name, replace(model, vocab_size=tokenizer.vocab_size), tokenizer=tokenizer)
        convert_quietly("megalm", "hf", tmp_path / name, tmp_path / f"{name}-hf")
        convert_quietly("hf", "megalm", tmp_path / f"{name}-hf", tmp_path / f"{name}-again")
        again = Tokenizer.load(tmp_path / f"{name}-again" / "tokenizer.json")
        assert (again.sha256, again.eos_id, again.mask_id) == (tokenizer.sha256, tokenizer.eos_id, tokenizer.mask_id)


def _with_files(tmp_path: Path, name: str, model, files: dict[str, str]) -> Path:
    write_random_run(tmp_path / f"{name}-run", model)
    convert_quietly("megalm", "hf", tmp_path / f"{name}-run", tmp_path / name)
    for file, text in files.items():
        (tmp_path / name / file).write_text(text, encoding="utf-8")
    return tmp_path / name


@pytest.mark.parametrize(("vocabulary", "merges"), [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")])
def test_vocabulary_and_merges_make_a_tokenizer(vocabulary: str, merges: str, bpe: Tokenizer, tmp_path: Path) -> None:
    parts = json.loads(bpe.definition)["model"]
    pairs = [" ".join(pair) for pair in parts["merges"]]
    words = parts["vocab"] | bpe.special_tokens
    files = {vocabulary: json.dumps(words), merges: "\n".join(["#version: 0.2", *pairs, ""])}
    folder = _with_files(tmp_path, "hf", replace(GPT2, vocab_size=bpe.vocab_size), files)
    convert_quietly("hf", "megalm", folder, tmp_path / "out")
    made = Tokenizer.load(tmp_path / "out" / "tokenizer.json")
    assert made.encode(TEXT) == bpe.encode(TEXT)
    assert made.decode(made.encode(TEXT)) == TEXT
    assert (made.eos_id, made.vocab_size) == (bpe.eos_id, bpe.vocab_size)


@pytest.mark.parametrize("lowercase", [True, False])
def test_a_wordpiece_vocabulary_makes_a_tokenizer(lowercase: bool, tmp_path: Path) -> None:
    tokenizer = train_wordpiece(CORPUS * 3, 160, lowercase=lowercase)
    words = json.loads(tokenizer.definition)["model"]["vocab"]
    files = {"vocab.txt": "".join(f"{word}\n" for word in sorted(words, key=words.get))}
    if not lowercase:
        files["tokenizer_config.json"] = json.dumps({"do_lower_case": False})
    folder = _with_files(tmp_path, "hf", replace(BERT, vocab_size=tokenizer.vocab_size), files)
    convert_quietly("hf", "megalm", folder, tmp_path / "out")
    made = Tokenizer.load(tmp_path / "out" / "tokenizer.json")
    assert made.encode(TEXT) == tokenizer.encode(TEXT)
    assert (made.eos_id, made.mask_id, made.before_ids) == (tokenizer.eos_id, tokenizer.mask_id, tokenizer.before_ids)


def test_a_tokenizer_that_cannot_be_had_is_a_note(bpe: Tokenizer, tmp_path: Path) -> None:
    model = replace(GPT2, vocab_size=bpe.vocab_size)
    cases = {
        "none": ({}, "no tokenizer"),
        "sentencepiece": ({"tokenizer.model": "x"}, "SentencePiece"),
        "xlm-r": ({"sentencepiece.bpe.model": "x"}, "sentencepiece.bpe.model is SentencePiece's"),
        "spoiled": ({"tokenizer.json": "{"}, "is not a tokenizer.json"),
        "empty": ({"tokenizer.json": EMPTY}, "has no tokens"),
        "merges": ({"vocab.json": "{}", "merges.txt": "a b c d\n"}, "no vocabulary and merges of a BPE"),
    }
    for name, (files, fragment) in cases.items():
        folder = _with_files(tmp_path, name, model, files)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 0}))
        report = convert_quietly("hf", "megalm", folder, tmp_path / f"{name}-out")
        assert any(fragment in note for note in report.notes), report.notes
        assert not (tmp_path / f"{name}-out" / "tokenizer.json").exists()


def test_the_end_of_a_document_may_be_named_in_the_models_config(bpe: Tokenizer, tmp_path: Path) -> None:
    definition = bpe.definition.replace("<|endoftext|>", "<|finis|>")
    folder = _with_files(tmp_path, "hf", replace(GPT2, vocab_size=bpe.vocab_size), {"tokenizer.json": definition})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": [0, 7]}))
    convert_quietly("hf", "megalm", folder, tmp_path / "out")
    assert Tokenizer.load(tmp_path / "out" / "tokenizer.json").eos_id == 0
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 999}))
    notes = convert_quietly("hf", "megalm", folder, tmp_path / "none").notes
    assert any("eos_token_id=999 is none of its tokens" in note for note in notes)


def test_a_tokenizer_of_another_model_is_refused_and_tokens_without_embedding_are_said(
    bpe: Tokenizer, tmp_path: Path
) -> None:
    files = {"tokenizer.json": bpe.definition}
    folder = _with_files(tmp_path, "small", replace(GPT2, vocab_size=bpe.vocab_size - 10), files)
    with pytest.raises(
        CheckpointError, match=r"not this model's, which has 290 words: 10 words such as .* have no emb"
    ):
        convert_quietly("hf", "megalm", folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    grown = tokenizers.Tokenizer.from_str(bpe.definition)
    grown.add_special_tokens(["<pad>"])
    files = {"tokenizer.json": grown.to_str()}
    folder = _with_files(tmp_path, "padded", replace(GPT2, vocab_size=bpe.vocab_size), files)
    (note,) = convert_quietly("hf", "megalm", folder, tmp_path / "out").notes
    assert note.startswith("the tokenizer has 301 tokens, the model 300: <pad> have no embedding")


def test_a_run_is_not_exported_with_a_tokenizer_that_took_its_ones_place(bpe: Tokenizer, tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_random_run(run, replace(GPT2, vocab_size=bpe.vocab_size), tokenizer=bpe)
    (run / "tokenizer.json").write_text(train_byte_level_bpe(["other words"], 270).definition)
    with pytest.raises(CheckpointError, match="not the one that the model was trained with") as error:
        convert_quietly("megalm", "hf", run, tmp_path / "hf")
    assert f"(300 tokens, sha256 {bpe.sha256[:12]})" in str(error.value)
    with pytest.raises(CheckpointError, match="not the one that the model was trained with"):
        run_generate(run, "x", max_new_tokens=1, temperature=0.0, top_k=0, seed=0)


def test_an_end_by_a_name_that_is_no_token_is_taken_by_its_id(bpe: Tokenizer, tmp_path: Path) -> None:
    settings = json.dumps({"eos_token": "<|missing|>"})
    files = {"tokenizer.json": bpe.definition, "tokenizer_config.json": settings}
    folder = _with_files(tmp_path, "hf", replace(GPT2, vocab_size=bpe.vocab_size), files)
    report = convert_quietly("hf", "megalm", folder, tmp_path / "none")
    assert "eos_token=<|missing|> is none of its tokens (it has <|endoftext|>" in report.notes[0]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 2}))
    report = convert_quietly("hf", "megalm", folder, tmp_path / "word")
    assert "eos_token_id=2 is an ordinary word, '!'" in report.notes[0]
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": [2, 0]}))
    assert convert_quietly("hf", "megalm", folder, tmp_path / "out").notes == ()
    assert Tokenizer.load(tmp_path / "out" / "tokenizer.json").eos_id == 0


def test_tokens_that_were_added_to_a_vocabulary_are_honoured(bpe: Tokenizer, tmp_path: Path) -> None:
    parts = json.loads(bpe.definition)["model"]
    words, size = parts["vocab"] | bpe.special_tokens, bpe.vocab_size
    files = {
        "vocab.json": json.dumps(words),
        "merges.txt": "\n".join(" ".join(pair) for pair in parts["merges"]),
        "added_tokens.json": json.dumps({"<tab>": size + 1, "<pad>": size}),
        "special_tokens_map.json": json.dumps({"pad_token": {"content": "<pad>"}, "eos_token": "<|endoftext|>"}),
        "tokenizer_config.json": json.dumps(
            {"added_tokens_decoder": {str(size + 2): {"content": "<sys>", "special": True}}}
        ),
    }
    folder = _with_files(tmp_path, "hf", replace(GPT2, vocab_size=size + 3), files)
    assert convert_quietly("hf", "megalm", folder, tmp_path / "out").notes == ()
    made = Tokenizer.load(tmp_path / "out" / "tokenizer.json")
    assert made.special_tokens == {"<|endoftext|>": 0, "<pad>": size, "<sys>": size + 2}
    assert made.encode("def<tab>") == [*bpe.encode("def"), size + 1]
    (folder / "added_tokens.json").write_text(json.dumps({"<pad>": size + 9}))
    (note,) = convert_quietly("hf", "megalm", folder, tmp_path / "none").notes
    assert "does not follow the vocabulary" in note


def test_a_chat_template_goes_with_the_tokenizer(bpe: Tokenizer, tmp_path: Path) -> None:
    settings = json.dumps({"eos_token": {"content": "<|endoftext|>"}, "chat_template": "{{ messages }}"})
    files = {"tokenizer.json": bpe.definition, "tokenizer_config.json": settings}
    folder = _with_files(tmp_path, "hf", replace(GPT2, vocab_size=bpe.vocab_size), files)
    report = convert_quietly("hf", "megalm", folder, tmp_path / "out")
    assert report.notes == ()
    assert Tokenizer.load(tmp_path / "out").roles.chat_template == "{{ messages }}"
    assert Tokenizer.load(tmp_path / "out").eos_id == bpe.eos_id


_MARKED = ("<s>", "<pad>", "</s>", "<unk>")


def _fairseq_bpe() -> tokenizers.Tokenizer:
    """As RoBERTa's: bytes, the special tokens first, and ``<mask>`` last."""
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(CORPUS, vocab_size=300, special_tokens=[*_MARKED])
    made._tokenizer.add_special_tokens([tokenizers.AddedToken("<mask>", lstrip=True, special=True)])
    made._tokenizer.post_processor = tokenizers.processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return made._tokenizer


def _fairseq_unigram() -> tokenizers.Tokenizer:
    """As XLM-R's: SentencePiece's unigrams, the same special tokens, ``<mask>`` last."""
    made = tokenizers.SentencePieceUnigramTokenizer()
    made.train_from_iterator(CORPUS * 3, vocab_size=120, special_tokens=[*_MARKED], unk_token="<unk>")
    made._tokenizer.add_special_tokens([tokenizers.AddedToken("<mask>", special=True)])
    made._tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return made._tokenizer


@pytest.mark.parametrize(
    ("make", "kind", "architecture"),
    [(_fairseq_bpe, "RobertaTokenizer", "roberta"), (_fairseq_unigram, "XLMRobertaTokenizer", "xlm-roberta")],
)
def test_the_tokenizers_of_roberta_and_xlm_r_keep_their_roles(
    make, kind: str, architecture: str, tmp_path: Path
) -> None:
    definition = make()
    names = ("bos", "pad", "eos", "unk")
    settings = {f"{name}_token": token for name, token in zip(names, _MARKED, strict=True)}
    settings |= {"mask_token": "<mask>", "cls_token": "<s>", "sep_token": "</s>", "tokenizer_class": kind}
    files = {"tokenizer.json": definition.to_str(), "tokenizer_config.json": json.dumps(settings)}
    model = replace(ROBERTA, vocab_size=definition.get_vocab_size())
    folder = _with_files(tmp_path, "hf", model, files)
    values = json.loads((folder / "config.json").read_text())
    ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "model_type": architecture}
    (folder / "config.json").write_text(json.dumps(values | ids))
    convert_quietly("hf", "megalm", folder, tmp_path / "out", verify=True)
    ours = Tokenizer.load(tmp_path / "out" / "tokenizer.json")
    assert (ours.before_ids, ours.end_ids, ours.role_id("pad")) == ((0,), (2,), 1)
    assert ours.mask_id == ours.vocab_size - 1 == definition.token_to_id("<mask>")
    convert_quietly("megalm", "hf", tmp_path / "out", tmp_path / "again", verify=True)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / "again" / file).read_text()) == json.loads((folder / file).read_text())
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert {name: again[name] for name in ids} == ids


def test_distilberts_tokenizer_is_berts(wordpiece: Tokenizer, tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_random_run(run, replace(DISTILBERT, vocab_size=wordpiece.vocab_size), tokenizer=wordpiece)
    convert_quietly("megalm", "hf", run, tmp_path / "hf", verify=True)
    settings = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]
    convert_quietly("hf", "megalm", tmp_path / "hf", tmp_path / "again", verify=True)
    again = Tokenizer.load(tmp_path / "again" / "tokenizer.json")
    assert (again.mask_id, again.before_ids, again.end_ids) == (
        wordpiece.mask_id,
        wordpiece.before_ids,
        wordpiece.end_ids,
    )


def test_a_padding_that_roberta_would_not_count_from_is_refused(wordpiece: Tokenizer, tmp_path: Path) -> None:
    padding = wordpiece.role_id("pad")
    assert padding == 0
    for offset in (2, padding + 1):
        model = replace(ROBERTA, vocab_size=wordpiece.vocab_size, position_offset=offset)
        write_random_run(tmp_path / f"run{offset}", model, tokenizer=wordpiece)
    with pytest.raises(CheckpointError) as refusal:
        convert_quietly("megalm", "hf", tmp_path / "run2", tmp_path / "out")
    assert "pad_token_id is 0, and RoBERTa computes with 1" in str(refusal.value)
    assert "model.position_offset=1" in str(refusal.value)
    assert not (tmp_path / "out").exists()
    convert_quietly("megalm", "hf", tmp_path / "run1", tmp_path / "out", verify=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["pad_token_id"] == 0
