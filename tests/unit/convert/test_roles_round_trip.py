"""What tokens are for survives the way from a Hugging Face folder into a run and back, as the library sees it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from foreign_models import BERT, GPT2, LLAMA, NEOX, convert_quietly, write_random_run

from megalm.config.schema import Model
from megalm.convert.verify_tokenizer import compare_tokenizers
from megalm.data.tokenization.chat import CHATML
from megalm.data.tokenization.settings_files import SettingsFiles
from megalm.data.tokenization.tokenizer import Tokenizer
from megalm.data.tokenization.training import train_byte_level_bpe, train_wordpiece
from megalm.errors import CheckpointError
from megalm.generate.run import run_generate
from tests.chat_models import MODELS, ChatModel

NAMES = ("special_tokens_map", "all_special_tokens", "all_special_ids", "chat_template", "padding_side")
IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id")


def folder_of(tmp_path: Path, model: Model, words: int, files: dict[str, Any], ids: dict[str, Any]) -> Path:
    """A Hugging Face folder with a random model, the files of a tokenizer, and ids in its config."""
    write_random_run(tmp_path / "first", replace(model, vocab_size=words))
    folder = tmp_path / "theirs"
    convert_quietly("megalm", "hf", tmp_path / "first", folder)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text, encoding="utf-8")
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in IDS} | ids
    (folder / "config.json").write_text(json.dumps(config))
    if "generation_config.json" not in files:
        (folder / "generation_config.json").unlink(missing_ok=True)
    return folder


def there_and_back(folder: Path, tmp_path: Path) -> Path:
    convert_quietly("hf", "megalm", folder, tmp_path / "run", verify=True)
    report = convert_quietly("megalm", "hf", tmp_path / "run", tmp_path / "back", verify=True)
    assert any(line.endswith(": as they were") for line in report.verified) or not (folder / "tokenizer.json").exists()
    return tmp_path / "back"


def assert_same(one: Path, other: Path) -> None:
    transformers = pytest.importorskip("transformers")
    first, second = (transformers.AutoTokenizer.from_pretrained(folder) for folder in (one, other))
    for name in NAMES:
        assert getattr(first, name) == getattr(second, name), name
    assert first("two and two").input_ids == second("two and two").input_ids
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (one, other))
    assert {key: before[key] for key in IDS if key in before} == {key: after[key] for key in IDS if key in after}
    configs = [transformers.AutoConfig.from_pretrained(folder) for folder in (one, other)]
    assert all(getattr(configs[0], key, None) == getattr(configs[1], key, None) for key in IDS)


BYTE_LEVEL = train_byte_level_bpe(["two and two are four"] * 3, 280, ["<pad>", "<x>", "<y>"])
CASES: dict[str, tuple[Model, dict[str, Any], dict[str, Any]]] = {
    "bos-is-not-eos": (
        LLAMA,
        {"bos_token": "<x>", "eos_token": "<y>", "pad_token": "<pad>"},
        {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 1},
    ),
    "no-bos": (
        GPT2,
        {"bos_token": None, "eos_token": "<|endoftext|>", "unk_token": None},
        {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None},
    ),
    "pad-is-eos": (
        NEOX,
        {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
        {"bos_token_id": 0, "eos_token_id": 0},
    ),
    "additional": (
        LLAMA,
        {"eos_token": "<y>", "additional_special_tokens": ["<x>"], "padding_side": "left"},
        {"bos_token_id": 1, "eos_token_id": [3, 2], "pad_token_id": -1},
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "GPT2Tokenizer"])
def test_roles_and_ids_survive(name: str, kind: str, tmp_path: Path) -> None:
    model, settings, ids = CASES[name]
    files = {"tokenizer.json": BYTE_LEVEL.definition, "tokenizer_config.json": {"tokenizer_class": kind, **settings}}
    folder = folder_of(tmp_path, model, BYTE_LEVEL.vocab_size, files, ids)
    back = there_and_back(folder, tmp_path)
    assert_same(folder, back)
    assert not (back / "generation_config.json").exists()


def test_an_encoders_roles_survive(tmp_path: Path) -> None:
    definition = train_wordpiece(["two and two are four"] * 3, 130).definition
    settings = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": False,
        **{f"{role}_token": f"[{role.upper()}]" for role in ("unk", "sep", "pad", "cls", "mask")},
    }
    files = {"tokenizer.json": definition, "tokenizer_config.json": settings}
    folder = folder_of(tmp_path, BERT, Tokenizer(definition).vocab_size, files, {"pad_token_id": 0})
    assert_same(folder, there_and_back(folder, tmp_path))


@pytest.mark.parametrize("name", MODELS)
def test_chat_models_survive_with_their_templates(name: str, tmp_path: Path) -> None:
    chat = MODELS[name]
    words = Tokenizer(chat.definition).vocab_size
    numbers = Tokenizer(chat.definition).special_tokens
    ends = [numbers[chat.turn_end], numbers[str(chat.settings["eos_token"])]]
    files = {
        "tokenizer.json": chat.definition,
        "tokenizer_config.json": chat.settings,
        "generation_config.json": {"eos_token_id": ends, "temperature": 0.6, "do_sample": True},
    }
    folder = folder_of(tmp_path, LLAMA, words, files, {"eos_token_id": ends, "bos_token_id": None})
    back = there_and_back(folder, tmp_path)
    assert_same(folder, back)
    assert json.loads((back / "generation_config.json").read_text()) == files["generation_config.json"]
    assert (back / "chat_template.jinja").read_text() == chat.template
    assert json.loads((back / "tokenizer_config.json").read_text())["chat_template"] == chat.template
    run = Tokenizer.load(tmp_path / "run")
    assert set(ends) <= run.stop_ids


@pytest.mark.parametrize("spelling", ["file", "list", "folder"])
def test_templates_are_read_in_every_spelling(spelling: str, tmp_path: Path) -> None:
    chat: ChatModel = MODELS["qwen"]
    settings = {key: value for key, value in chat.settings.items() if key != "chat_template"}
    named = [{"name": "default", "template": chat.template}, {"name": "rag", "template": "{{ messages }}"}]
    files: dict[str, Any] = {"tokenizer.json": chat.definition, "tokenizer_config.json": settings}
    if spelling == "list":
        files["tokenizer_config.json"] = settings | {"chat_template": named}
    else:
        files["chat_template.jinja"] = chat.template
    folder = folder_of(tmp_path, LLAMA, Tokenizer(chat.definition).vocab_size, files, {})
    if spelling == "folder":
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    back = there_and_back(folder, tmp_path)
    assert_same(folder, back)
    assert Tokenizer.load(tmp_path / "run").roles.chat_template == chat.template
    assert (back / "additional_chat_templates" / "rag.jinja").exists() is (spelling != "file")


@pytest.mark.parametrize(
    "ids", [{"bos_token_id": 5, "eos_token_id": 7, "pad_token_id": None}, {"eos_token_id": [1, 2]}, {}]
)
def test_ids_without_a_tokenizer_are_those_of_the_config(ids: dict[str, Any], tmp_path: Path) -> None:
    folder = folder_of(tmp_path, GPT2, 101, {"generation_config.json": {"max_length": 9, **ids}}, ids)
    back = there_and_back(folder, tmp_path)
    for name in ("config.json", "generation_config.json"):
        before, after = (json.loads((place / name).read_text()) for place in (folder, back))
        assert {key: before[key] for key in IDS if key in before} == {key: after[key] for key in IDS if key in after}
    assert json.loads((back / "generation_config.json").read_text())["max_length"] == 9
    (copy,) = [convert_quietly("megalm", "megalm", tmp_path / "run", tmp_path / "copy", tp=2)]
    assert copy.notes
    convert_quietly("megalm", "hf", tmp_path / "copy", tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (back / "config.json").read_text()


def test_ends_that_only_the_config_names_stop_generation(tmp_path: Path) -> None:
    chat = MODELS["llama-3"]
    files = {"tokenizer.json": chat.definition, "tokenizer_config.json": chat.settings | {"chat_template": None}}
    folder = folder_of(tmp_path, LLAMA, Tokenizer(chat.definition).vocab_size, files, {"eos_token_id": [341, 3]})
    convert_quietly("hf", "megalm", folder, tmp_path / "run")
    assert {341, 3} <= Tokenizer.load(tmp_path / "run").stop_ids


@pytest.mark.parametrize("through", ["megatron"])
def test_another_format_carries_roles_and_template(through: str, tmp_path: Path) -> None:
    chat = MODELS["llama-3"]
    words = Tokenizer(chat.definition).vocab_size
    files = {"tokenizer.json": chat.definition, "tokenizer_config.json": chat.settings}
    folder = folder_of(tmp_path, LLAMA, words, files, {"bos_token_id": 340, "eos_token_id": 341})
    convert_quietly("hf", through, folder, tmp_path / through, verify=True)
    convert_quietly(through, "megalm", tmp_path / through, tmp_path / "run", verify=True)
    convert_quietly("megalm", "hf", tmp_path / "run", tmp_path / "back", verify=True)
    transformers = pytest.importorskip("transformers")
    first, second = (transformers.AutoTokenizer.from_pretrained(place) for place in (folder, tmp_path / "back"))
    assert all(getattr(first, name) == getattr(second, name) for name in NAMES)


def test_a_run_of_megalms_own_is_exported_with_its_template_and_both_ends(tmp_path: Path) -> None:
    """As ``prepare_data.py --corpus sft`` leaves a tokenizer that has ChatML's marks and no template."""
    own = train_byte_level_bpe(["two and two"] * 3, 290, ["<|im_start|>", "<|im_end|>"])
    texts = {**own.texts(), "chat_template.jinja": CHATML}
    tokenizer = Tokenizer(
        own.definition, files=SettingsFiles({k: v for k, v in texts.items() if k != "tokenizer.json"})
    )
    write_random_run(tmp_path / "run", replace(GPT2, vocab_size=tokenizer.vocab_size), tokenizer=tokenizer)
    convert_quietly("megalm", "hf", tmp_path / "run", tmp_path / "hf", verify=True)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs.chat_template == CHATML
    assert (theirs.bos_token, theirs.eos_token) == (None, "<|endoftext|>")
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "hf")
    assert generation.eos_token_id == [0, tokenizer.special_tokens["<|im_end|>"]]
    text = run_generate(tmp_path / "run", "<|im_start|>user\ntwo", max_new_tokens=2, temperature=0.0, top_k=0, seed=0)
    assert text.startswith("<|im_start|>user\ntwo")


def test_verify_names_everything_that_differs(tmp_path: Path) -> None:
    chat = MODELS["qwen"]
    chat.write(tmp_path / "one")
    other = chat.settings | {"eos_token": "<|endoftext|>", "chat_template": "{{ messages }}"}
    replace(chat, settings=other).write(tmp_path / "two")
    grown = tokenizers.Tokenizer.from_str(chat.definition)
    grown.add_special_tokens(["<new>"])
    replace(chat, definition=str(grown.to_str())).write(tmp_path / "three")
    places = {"source_at": tmp_path / "one", "target_at": tmp_path / "two"}
    one, two, three = (Tokenizer.load(tmp_path / name) for name in ("one", "two", "three"))
    assert "eos <|im_end|>" in compare_tokenizers(one, one, **places)
    with pytest.raises(CheckpointError) as error:
        compare_tokenizers(one, two, **places)
    lines = str(error.value).splitlines()
    assert lines[0] == "eos_token: '<|im_end|>' was read, '<|endoftext|>' written"
    assert any(line.startswith("chat template: ") for line in lines)
    assert any(line.startswith("eos_token's id: ") for line in lines)
    with pytest.raises(CheckpointError, match=r"ids differ\nspecial tokens: "):
        compare_tokenizers(one, three, **places)
    with pytest.raises(CheckpointError, match="cannot be read again"):
        compare_tokenizers(one, None, **places)
