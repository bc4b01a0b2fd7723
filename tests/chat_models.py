# ruff: noqa: E501 - white space counts in templates
"""Small tokenizers that cut text as those of well-known chat models do, and templates that lay turns out as theirs do.

The templates are written for these tests; what they share with the models' own is the text that they make.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = [
    "What is two and two? Two and two are four.",
    "You are a helpful assistant. Answer in one word.",
    "system user assistant model the capital of France is Paris",
]


@dataclass(frozen=True)
class ChatModel:
    """One model's tokenizer and template.

    Attributes:
        definition: of the tokenizer.
        settings: contents of its ``tokenizer_config.json``, the template included.
        turn_end: the token that ends an assistant's turn.
        takes_system: whether the template takes a system's message.
    """

    definition: str
    settings: dict[str, object]
    turn_end: str
    takes_system: bool = True

    @property
    def template(self) -> str:
        return str(self.settings["chat_template"])

    def write(self, folder: Path) -> Path:
        """As a folder that both libraries read."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self.definition, encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(self.settings), encoding="utf-8")
        return folder


def _byte_level(special: list[str], bos: str | None = None, *, prefix: bool = False) -> str:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens(special)
    return _with_bos(tokenizer, bos)


def _sentencepiece(special: list[str], bos: str | None, *, scheme: str) -> str:
    """As SentencePiece's BPE: spaces are ``▁``, one of which may come before the text, and bytes for what is unknown."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    if scheme == "normalizer":  # how Llama 2's was written first: before every stretch of text
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif scheme == "never":
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    bytes_of_fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=520,
        special_tokens=[*special, *bytes_of_fallback],
        show_progress=False,
        initial_alphabet=list("abcdefghijklmnopqrstuvwxyz▁.?\n"),
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    parts = json.loads(tokenizer.to_str())
    parts["added_tokens"] = [token for token in parts["added_tokens"] if token["content"] in special]
    return _with_bos(tokenizers.Tokenizer.from_str(json.dumps(parts)), bos)


def _with_bos(tokenizer: tokenizers.Tokenizer, bos: str | None) -> str:
    if bos is not None:
        number = tokenizer.token_to_id(bos)
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, number)])
    return str(tokenizer.to_str())


LLAMA_2 = """{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}{% set system = messages[0]['content'] %}
{% else %}{% set turns = messages %}{% set system = false %}{% endif %}
{% for message in turns %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}
{% if message['role'] == 'user' %}
{% set said = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] if loop.index0 == 0 and system else message['content'] %}
{{- bos_token + '[INST] ' + said.strip() + ' [/INST]' -}}
{% else %}
{{- ' ' + message['content'].strip() + ' ' + eos_token -}}
{% endif %}
{% endfor %}"""
LLAMA_3 = """{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""
GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}
{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
MISTRAL = """{{- bos_token }}
{%- for message in messages %}
{%- if message['role'] == 'user' %}{{- '[INST] ' + message['content'] + ' [/INST]' }}
{%- elif message['role'] == 'assistant' %}{{- ' ' + message['content'] + eos_token }}
{%- else %}{{- raise_exception('Only user and assistant roles are supported') }}{%- endif %}
{%- endfor %}"""
ZEPHYR = """{% for message in messages %}
{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token }}
{% if loop.last and add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}
{% endfor %}"""
QWEN = """{% for message in messages %}
{% if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
THINKING = """{% set last = namespace(user=-1) %}
{% for message in messages %}{% if message['role'] == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}
{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' and loop.index0 > last.user %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{{- message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
GENERATION = """{% for message in messages %}<|im_start|>{{ message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}{{ '\\n' }}
{%- else %}{{ message['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
_CHATML_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_HEADERS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def _settings(template: str, **tokens: object) -> dict[str, object]:
    return {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template, **tokens}


_LLAMA_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
MODELS: dict[str, ChatModel] = {
    "llama-2": ChatModel(
        _sentencepiece(["<unk>", "<s>", "</s>"], "<s>", scheme="normalizer"),
        _settings(LLAMA_2, **_LLAMA_TOKENS),
        "</s>",
    ),
    "llama-2-first": ChatModel(
        _sentencepiece(["<unk>", "<s>", "</s>"], "<s>", scheme="first"), _settings(LLAMA_2, **_LLAMA_TOKENS), "</s>"
    ),
    "llama-3": ChatModel(
        _byte_level(_HEADERS, "<|begin_of_text|>"),
        _settings(LLAMA_3, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>"),
        "<|eot_id|>",
    ),
    "gemma": ChatModel(
        _sentencepiece(
            ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"], "<bos>", scheme="never"
        ),
        _settings(GEMMA, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"),
        "<end_of_turn>",
        takes_system=False,
    ),
    "mistral": ChatModel(
        _sentencepiece(["<unk>", "<s>", "</s>", "[INST]", "[/INST]"], "<s>", scheme="always"),
        _settings(MISTRAL, **_LLAMA_TOKENS),
        "</s>",
        takes_system=False,
    ),
    "zephyr": ChatModel(
        _sentencepiece(["<unk>", "<s>", "</s>"], "<s>", scheme="always"), _settings(ZEPHYR, **_LLAMA_TOKENS), "</s>"
    ),
    "qwen": ChatModel(
        _byte_level(_CHATML_TOKENS),
        _settings(QWEN, eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token=None),
        "<|im_end|>",
    ),
    "thinking": ChatModel(
        _byte_level(_CHATML_TOKENS),
        _settings(THINKING, eos_token="<|im_end|>", pad_token="<|endoftext|>"),
        "<|im_end|>",
    ),
    "generation-blocks": ChatModel(
        _byte_level(_CHATML_TOKENS, prefix=True), _settings(GENERATION, eos_token="<|endoftext|>"), "<|im_end|>"
    ),
}
"""By what tests call them."""

CONVERSATIONS: tuple[tuple[dict[str, str], ...], ...] = tuple(
    tuple({"role": role, "content": content} for role, content in turns)
    for turns in (
        (("user", "What is two and two?"), ("assistant", "Four.")),
        (("user", " spaces around "), ("assistant", "  and here\n\ntoo  ")),
        (
            ("user", "The capital of France?"),
            ("assistant", "Paris."),
            ("user", "Four in German? ☃"),
            ("assistant", "vier, naïve"),
        ),
        (("system", "Answer in one word."), ("user", "two and two"), ("assistant", "four")),
    )
)
