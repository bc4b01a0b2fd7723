"""What a tokenizer's own files say of its tokens holds: in data, when saved, and as Hugging Face's library reads it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from megalm.data.document import Document, Segment
from megalm.data.tokenization.document_tokens import encode_documents
from megalm.data.tokenization.library_classes import END_OF_TEXT
from megalm.data.tokenization.postprocessor import with_marks
from megalm.data.tokenization.roles import Marks, around
from megalm.data.tokenization.settings_files import ROLES
from megalm.data.tokenization.tokenizer import Tokenizer
from megalm.data.tokenization.training import train_byte_level_bpe, train_wordpiece
from megalm.errors import DataError

TEXTS = ["the quick brown fox jumps over a lazy dog", "def main(): return 0", "a <b>bold</b> word </s> of HTML"] * 3
PLAIN = "the quick brown fox: def main() returns"


def _byte_level(*special: str) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def _sentencepiece_bpe(*special: str) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=list(special), show_progress=False)
    tokenizer.train_from_iterator([text.replace(" ", "▁") for text in TEXTS], trainer)
    return tokenizer


def _unigram(*special: str, unk: str = "<unk>") -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=list(special), unk_token=unk, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def _template(tokenizer: tokenizers.Tokenizer, single: str) -> tokenizers.processors.TemplateProcessing:
    names = [name for name in single.split() if name != "$A"]
    return processors.TemplateProcessing(
        single=single, special_tokens=[(name, tokenizer.token_to_id(name)) for name in names]
    )


def _dict_of(content: str) -> dict[str, Any]:
    return {"__type": "AddedToken", "content": content, "lstrip": False, "normalized": False, "special": True}


@dataclass
class Family:
    """A tokenizer as a family of published models has it, and what is right."""

    make: Callable[[], tokenizers.Tokenizer]
    files: dict[str, Any]
    before: tuple[str, ...]
    end: str
    roles: dict[str, str | None]
    library: bool = True
    after: tuple[str, ...] = ()
    template: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True)
        self.make().save(str(folder / "tokenizer.json"))
        for name, content in self.files.items():
            (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return folder


def _gpt2() -> tokenizers.Tokenizer:
    return _byte_level(END_OF_TEXT)


def _llama_2() -> tokenizers.Tokenizer:
    tokenizer = _sentencepiece_bpe("<unk>", "<s>", "</s>")
    tokenizer.post_processor = _template(tokenizer, "<s> $A")
    return tokenizer


def _llama_3() -> tokenizers.Tokenizer:
    tokenizer = _byte_level("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>")
    template = _template(tokenizer, "<|begin_of_text|> $A")
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return tokenizer


def _gemma() -> tokenizers.Tokenizer:
    tokenizer = _sentencepiece_bpe("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>")
    tokenizer.add_tokens([AddedToken(name, normalized=False, special=False) for name in ("<b>", "</b>", "<s>", "</s>")])
    tokenizer.post_processor = _template(tokenizer, "<bos> $A")
    return tokenizer


def _t5() -> tokenizers.Tokenizer:
    tokenizer = _unigram("<pad>", "</s>", "<unk>")
    tokenizer.post_processor = _template(tokenizer, "$A </s>")
    return tokenizer


def _bert() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer.from_str(train_wordpiece(TEXTS, 150).definition)
    ends = [(name, tokenizer.token_to_id(name)) for name in ("[SEP]", "[CLS]")]
    tokenizer.post_processor = processors.BertProcessing(*ends)
    return tokenizer


def _roberta() -> tokenizers.Tokenizer:
    tokenizer = _byte_level("<s>", "<pad>", "</s>", "<unk>", "<mask>")
    ends = [(name, tokenizer.token_to_id(name)) for name in ("</s>", "<s>")]
    tokenizer.post_processor = processors.RobertaProcessing(*ends)
    return tokenizer


def _deberta() -> tokenizers.Tokenizer:
    tokenizer = _unigram("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", unk="[UNK]")
    tokenizer.post_processor = _template(tokenizer, "[CLS] $A [SEP]")
    return tokenizer


def _glm() -> tokenizers.Tokenizer:
    tokenizer = _byte_level("<|endoftext|>", "[gMASK]", "<sop>")
    tokenizer.post_processor = _template(tokenizer, "[gMASK] <sop> $A")
    return tokenizer


CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
FAMILIES = {
    "gpt2": Family(
        _gpt2,
        {"tokenizer_config.json": {"model_max_length": 1024}, "config.json": {"model_type": "gpt2", "eos_token_id": 0}},
        (),
        END_OF_TEXT,
        {"bos": END_OF_TEXT, "eos": END_OF_TEXT, "unk": END_OF_TEXT},
    ),
    "llama-2": Family(
        _llama_2,
        {
            "tokenizer_config.json": {
                "add_bos_token": True,
                "add_eos_token": False,
                **{
                    f"{role}_token": _dict_of(name)
                    for role, name in (("bos", "<s>"), ("eos", "</s>"), ("unk", "<unk>"))
                },
                "pad_token": None,
                "tokenizer_class": "LlamaTokenizer",
            }
        },
        ("<s>",),
        "</s>",
        {"bos": "<s>", "eos": "</s>", "unk": "<unk>"},
    ),
    "llama-3": Family(
        _llama_3,
        {
            "tokenizer_config.json": {
                "added_tokens_decoder": {"0": _dict_of("<|begin_of_text|>"), "1": _dict_of("<|end_of_text|>")},
                "bos_token": "<|begin_of_text|>",
                "eos_token": "<|end_of_text|>",
                "tokenizer_class": "PreTrainedTokenizerFast",
            },
            "generation_config.json": {"bos_token_id": 0, "eos_token_id": [1, 2]},
        },
        ("<|begin_of_text|>",),
        "<|end_of_text|>",
        {"bos": "<|begin_of_text|>", "eos": "<|end_of_text|>"},
    ),
    "llama-3 without eos_token": Family(
        _llama_3,
        {
            "tokenizer_config.json": {"bos_token": "<|begin_of_text|>", "tokenizer_class": "PreTrainedTokenizerFast"},
            "generation_config.json": {"eos_token_id": [2, 1]},
        },
        ("<|begin_of_text|>",),
        "<|eot_id|>",
        {"bos": "<|begin_of_text|>", "eos": "<|eot_id|>"},
        library=False,  # it looks at the model's ids when it generates, not for the tokenizer's roles
    ),
    "gemma": Family(
        _gemma,
        {
            "tokenizer_config.json": {
                "bos_token": "<bos>",
                "eos_token": "<eos>",
                "pad_token": "<pad>",
                "unk_token": "<unk>",
                "tokenizer_class": "PreTrainedTokenizerFast",
                "chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}],
            },
            "generation_config.json": {"eos_token_id": [1, 6]},
        },
        ("<bos>",),
        "<eos>",
        {"bos": "<bos>", "eos": "<eos>", "pad": "<pad>", "unk": "<unk>"},
        template="d",
    ),
    "qwen2": Family(
        lambda: _byte_level(END_OF_TEXT, "<|im_start|>", "<|im_end|>"),
        {
            "tokenizer_config.json": {
                "add_bos_token": False,
                "bos_token": None,
                "eos_token": "<|im_end|>",
                "pad_token": END_OF_TEXT,
                "unk_token": None,
                "tokenizer_class": "PreTrainedTokenizerFast",
                "chat_template": "old",
            },
            "chat_template.jinja": CHATML,
        },
        (),
        "<|im_end|>",
        {"eos": "<|im_end|>", "pad": END_OF_TEXT},
        template=CHATML,
    ),
    "t5, in special_tokens_map.json alone": Family(
        _t5,
        {
            "special_tokens_map.json": {"eos_token": _dict_of("</s>"), "unk_token": "<unk>", "pad_token": "<pad>"},
            "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
        },
        (),
        "</s>",
        {"eos": "</s>", "unk": "<unk>", "pad": "<pad>"},
        after=("</s>",),
    ),
    "bert": Family(
        _bert,
        {"tokenizer_config.json": {"do_lower_case": False, "tokenizer_class": "BertTokenizer"}},
        ("[CLS]",),
        "[SEP]",
        {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"},
        after=("[SEP]",),
    ),
    "roberta": Family(
        _roberta,
        {"tokenizer_config.json": {"tokenizer_class": "RobertaTokenizer"}, "config.json": {"model_type": "roberta"}},
        ("<s>",),
        "</s>",
        dict(zip(ROLES, ("<s>", "</s>", "<pad>", "<unk>", "<s>", "</s>", "<mask>"), strict=True)),
        after=("</s>",),
    ),
    "deberta": Family(
        _deberta,
        {
            "tokenizer_config.json": {
                **dict(zip([f"{r}_token" for r in ROLES], ("[CLS]", "[SEP]", "[PAD]", "[UNK]"), strict=False)),
                "cls_token": "[CLS]",
                "sep_token": "[SEP]",
                "mask_token": "[MASK]",
                "tokenizer_class": "PreTrainedTokenizerFast",
            }
        },
        ("[CLS]",),
        "[SEP]",
        dict(zip(ROLES, ("[CLS]", "[SEP]", "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"), strict=True)),
        after=("[SEP]",),
    ),
    "several tokens before a text": Family(
        _glm,
        {"tokenizer_config.json": {"eos_token": END_OF_TEXT, "tokenizer_class": "PreTrainedTokenizerFast"}},
        ("[gMASK]", "<sop>"),
        END_OF_TEXT,
        {"eos": END_OF_TEXT},
        library=False,  # bos falls to the first of them; the library leaves it open
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_roles_are_those_of_the_files(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    tokenizer = Tokenizer.load(family.write(tmp_path / "theirs"))
    roles = tokenizer.roles
    assert (roles.before, roles.after, roles.end) == (family.before, family.after, family.end)
    assert roles.chat_template == family.template
    if family.library:
        assert {role: roles.token(role) for role in ROLES} == {role: family.roles.get(role) for role in ROLES}
    tokens, lengths, _ = encode_documents(tokenizer, [Document.plain("", PLAIN), Document.plain("", "</s> fox </s>")])
    first = tokens[: lengths[0]].tolist()
    assert first == [*tokenizer.before_ids, *tokenizer.encode(PLAIN), tokenizer.eos_id]
    assert tokens.tolist().count(tokenizer.eos_id) == 2, "each document ends once, whatever its text spells"
    assert tokenizer.encode_prompt(PLAIN) == first[:-1]


@pytest.mark.parametrize("name", FAMILIES)
def test_roles_go_with_a_tokenizer_wherever_it_is_saved(name: str, tmp_path: Path) -> None:
    folder = FAMILIES[name].write(tmp_path / "theirs")
    for marks in (Marks(), Marks(add_bos=False), Marks(before=()), Marks(eos_id=1)):
        tokenizer = Tokenizer.load(folder, marks=marks)
        for number in range(2):
            copy = tmp_path / f"{marks}-{number}"
            copy.mkdir()
            tokenizer.save(copy)
            again = Tokenizer.load(copy)
            assert again.roles == tokenizer.roles
            assert again.definition == tokenizer.definition
            tokenizer = again
    kept = Tokenizer.load(folder).texts()
    for file in ("special_tokens_map.json", "generation_config.json", "chat_template.jinja"):
        if (folder / file).exists():
            assert kept[file] == (folder / file).read_text()


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.library])
def test_hugging_faces_library_reads_the_same_roles(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = FAMILIES[name].write(tmp_path / "theirs")
    ours, theirs = Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    ids = theirs(PLAIN).input_ids
    (tokens, _, _) = encode_documents(ours, [Document.plain("", PLAIN)])
    assert tokens.tolist() in (ids, [*ids, ours.eos_id])
    for role in ROLES:
        assert getattr(theirs, f"{role}_token_id") == ours.role_id(role), role


CLASSES = {
    "GPT2Tokenizer": (_gpt2, "gpt2"),
    "LlamaTokenizerFast": (_llama_2, "llama"),
    "GemmaTokenizer": (_gemma, "gemma"),
    "Qwen2Tokenizer": (lambda: _byte_level(END_OF_TEXT, "<|im_start|>"), "qwen2"),
    "T5Tokenizer": (_t5, "t5"),
    "BertTokenizerFast": (_bert, "bert"),
    "RobertaTokenizer": (_roberta, "roberta"),
    "DebertaV2Tokenizer": (_deberta, "deberta-v2"),
    "PreTrainedTokenizerFast": (_llama_2, "llama"),
}


@pytest.mark.parametrize("name", CLASSES)
def test_roles_that_no_file_gives_are_those_of_the_librarys_class(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    make, model_type = CLASSES[name]
    make().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name, "model_max_length": 64}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    found = {role: Tokenizer.load(tmp_path).role_id(role) for role in ROLES}
    assert found | {"bos": None} == {role: getattr(theirs, f"{role}_token_id") for role in ROLES} | {"bos": None}
    if theirs.bos_token_id is not None:  # else it is what the post-processor puts first
        assert found["bos"] == theirs.bos_token_id
    if name != "PreTrainedTokenizerFast":
        (tmp_path / "tokenizer_config.json").write_text("{}")
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        assert {role: Tokenizer.load(tmp_path).role_id(role) for role in ROLES} == found


def test_a_message_lists_few_of_many_special_tokens() -> None:
    definition = train_byte_level_bpe(TEXTS, 500, [f"<{i}>" for i in range(200)]).definition
    with pytest.raises(DataError, match=r"it has <\|endoftext\|>, <0>, .*<10>, … \(201 in all\)$"):
        Tokenizer(definition, marks=Marks(eos="<none>"))


def test_an_ordinary_word_ends_no_document(tmp_path: Path) -> None:
    tokenizer = _gemma()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path).roles.end == "<eos>", "</s> is a word of its texts"
    with pytest.raises(DataError, match=r"--eos </s>: an ordinary word, .* it has <pad>, <eos>, <bos>"):
        Tokenizer.load(tmp_path, marks=Marks(eos="</s>"))
    byte_level = train_byte_level_bpe(TEXTS, 300)
    word = next(
        word for word in json.loads(byte_level.definition)["model"]["vocab"] if word.startswith("Ġ") and word[1:]
    )
    with pytest.raises(DataError, match="an ordinary word"):
        Tokenizer(byte_level.definition, marks=Marks(eos=word))


def test_without_any_known_end_the_special_tokens_are_named(tmp_path: Path) -> None:
    _byte_level("<first>", "<last>").save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"no token of it is known to end a document \(it has <first>, <last>\)"):
        Tokenizer.load(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": 9}')
    with pytest.raises(DataError, match="eos_token_id=9 is an ordinary word"):
        Tokenizer.load(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": [9, 1]}')
    assert Tokenizer.load(tmp_path).roles.end == "<last>"
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": null}')
    assert Tokenizer.load(tmp_path).roles.end == "<last>"
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<first>"}')
    assert Tokenizer.load(tmp_path).roles.end == "<first>"


@pytest.mark.parametrize("kind", ["unigram", "word level", "unmarked"])
def test_no_text_spells_a_token_that_has_a_role(kind: str, tmp_path: Path) -> None:
    if kind == "word level":
        tokenizer = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "fox": 2, "<": 3}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.add_special_tokens(["</s>"])
    else:
        tokenizer = _unigram(*(["<unk>", "</s>"] if kind == "unigram" else ["<unk>"]))
    if kind == "unmarked":  # an added token that only the settings call special
        tokenizer.add_tokens([AddedToken("</s>", normalized=False, special=False)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    ours = Tokenizer.load(tmp_path)
    ids = ours.encode("fox </s> fox</s>")
    assert ours.eos_id not in ids
    tokens, _, _ = encode_documents(ours, [Document.plain("", "fox </s> fox")] * 200)
    assert tokens.tolist().count(ours.eos_id) == 200
    if kind != "word level":
        assert ours.decode(ids) == "fox </s> fox</s>"


def test_a_flag_of_the_settings_decides(tmp_path: Path) -> None:
    tokenizer = _byte_level("<s>", "</s>", "<x>")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>"}

    def roles(marks: Marks | None = None, **more: Any):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, **more}))
        return Tokenizer.load(tmp_path, marks=marks).roles

    assert roles().before == ()
    assert roles(add_bos_token=True).before == ("<s>",)
    assert roles(Marks(add_bos=True)).add_bos
    assert not roles(Marks(add_bos=False), add_bos_token=True).add_bos
    assert roles(add_eos_token=True).after == ("</s>",)
    assert roles(add_bos_token=True, bos_token=None).before == ()
    with pytest.raises(DataError, match=r"--add-bos: it has no token that begins a text; it has <s>, </s>, <x>"):
        roles(Marks(add_bos=True), bos_token=None)
    tokenizer.post_processor = _template(tokenizer, "<x> <s> $A <x> </s>")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert roles().before == ("<x>", "<s>")
    assert roles(add_bos_token=False).before == ("<x>",)
    ours = Tokenizer.load(tmp_path, marks=Marks(add_bos=True))
    (tokens, _, _) = encode_documents(ours, [Document.plain("", "fox")])
    assert tokens.tolist() == [2, 0, *ours.encode("fox"), 2, 1], "its own tokens, and one end"
    assert roles(add_eos_token=False).after == ("<x>",)


def test_a_template_that_begins_with_bos_is_not_given_another(tmp_path: Path) -> None:
    folder = FAMILIES["llama-3"].write(tmp_path / "theirs")
    source = "{{ bos_token }}{% generation %}{{ messages[0]['content'] }}{% endgeneration %}"
    (folder / "chat_template.jinja").write_text(source)
    ours = Tokenizer.load(folder)
    turn = ours.rendered(Document("", (Segment("fox", role="assistant"),)))
    tokens, _, mask = encode_documents(ours, [turn, Document("", (Segment("fox"),))])
    fox = ours.encode("fox")
    assert tokens.tolist() == [*ours.before_ids, *fox, ours.eos_id] * 2
    assert mask.tolist() == [0, *[1] * len(fox), 1, *[1] * (len(fox) + 2)]


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "generation_config.json"])
def test_a_damaged_file_of_settings_is_one_line(name: str, tmp_path: Path) -> None:
    folder = FAMILIES["llama-3"].write(tmp_path / "theirs")
    for content in (b"{", b"[]", b"\xff\xfe", b"[" * 100_000):
        (folder / name).write_bytes(content)
        with pytest.raises(DataError, match=name) as caught:
            Tokenizer.load(folder)
        assert "\n" not in str(caught.value)


def test_odd_values_in_the_settings_are_no_roles(tmp_path: Path) -> None:
    _byte_level("<s>", END_OF_TEXT).save(str(tmp_path / "tokenizer.json"))
    odd = {"bos_token": 7, "eos_token": {"no": "content"}, "add_bos_token": "yes", "added_tokens_decoder": [None, {}]}
    odd |= {"chat_template": [1, {"name": 2}], "additional_special_tokens": {"a": 3}, "tokenizer_class": 5}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(odd))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [true, -1, "1", 4294967296, null, 1e9]}')
    roles = Tokenizer.load(tmp_path).roles
    assert (roles.bos, roles.before, roles.end, roles.chat_template) == (None, (), END_OF_TEXT, None)


def test_a_folder_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer .*: the folder has no tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_megalms_own_tokenizers_are_marked_as_ever() -> None:
    bpe, wordpiece = train_byte_level_bpe(TEXTS, 300), train_wordpiece(TEXTS, 150)
    assert (bpe.roles.before, bpe.roles.end, bpe.document_start) == ((), END_OF_TEXT, None)
    assert (wordpiece.roles.before, wordpiece.roles.end, wordpiece.document_start) == (("[CLS]",), "[SEP]", None)
    assert (wordpiece.roles.pad, wordpiece.roles.unk, wordpiece.roles.mask) == ("[PAD]", "[UNK]", "[MASK]")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_definition_is_made_to_put_around_a_text_what_is_wanted(name: str) -> None:
    tokenizer = FAMILIES[name].make()
    definition, (before, after) = str(tokenizer.to_str()), around(tokenizer)
    assert with_marks(definition, before, after) is definition, "nothing is written anew without need"
    for marks in (((), ()), (before, ()), ((), after), (before * 2, after)):
        written = with_marks(definition, *marks)
        made = tokenizers.Tokenizer.from_str(written)
        assert around(made) == marks
        assert made.encode(PLAIN, add_special_tokens=False).ids == tokenizer.encode(PLAIN, add_special_tokens=False).ids
        ours, theirs = json.loads(written), json.loads(definition)
        assert {**ours, "post_processor": None} == {**theirs, "post_processor": None}
