"""Reads GPT-2 as OpenAI published it: a TensorFlow checkpoint, ``hparams.json``, and a tokenizer's files.

Names and shapes from ``src/model.py`` of https://github.com/openai/gpt-2: its dense layers are convolutions of width 1,
whose weights are [1, in, out].
"""

from __future__ import annotations

import re
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from megalm.config.schema import Model
from megalm.convert.checks import check_architecture, check_size, some_of
from megalm.convert.mapping import Rule, Shape, Transposed, missing_and_extra
from megalm.convert.openai.tf_bundle import DTYPES, TensorBundle, find_bundle, overlapping
from megalm.convert.untrusted.json_fields import Fields, read_json
from megalm.convert.untrusted.safe_path import safe_file
from megalm.convert.untrusted.safe_pickle import DTYPES as WEIGHT_DTYPES
from megalm.convert.weights import SourceInfo, WeightSource, full_shapes
from megalm.errors import CheckpointError

HPARAMS_FILE = "hparams.json"
_TOKENIZER_FILES = ("encoder.json", "vocab.bpe")
_TRAINING = re.compile(r"(?!model/).*|model/.*/(Adam|Adam_1|Adafactor|Momentum|ExponentialMovingAverage)")
"""What programs for fine-tuning leave beside the weights: step counters, slots of optimizers."""


class OpenAISource(WeightSource):
    """A folder of OpenAI's, opened for reading.

    Args:
        path: the folder.

    Raises:
        CheckpointError: see :class:`WeightSource`.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise CheckpointError(f"{path}: no such folder")
        model = _read_hparams(path)
        self._bundle = TensorBundle(find_bundle(path))
        entries = self._bundle.entries
        check_size(path / HPARAMS_FILE, model, sum(prod(entry.shape) for entry in entries.values()), len(entries))
        self._rules = {rule.name: rule for rule in rules(model)}
        extra = [name for name in entries if _TRAINING.fullmatch(name)]
        present = {name: _without_width(entry.shape) for name, entry in entries.items()}
        problems = missing_and_extra(list(self._rules.values()), full_shapes(model), present, ignored=extra)
        problems += [f"{name}: lies on another tensor's bytes" for name in overlapping(entries)]
        if problems:
            raise CheckpointError(some_of(problems, f"{self._bundle.index}: "))
        self.info = SourceInfo(
            format="openai-gpt2",
            path=path,
            model=model,
            dtype=self._dtype(),
            tokenizer=path if all((path / name).is_file() for name in _TOKENIZER_FILES) else None,
            notes=(f"left out {len(extra)} tensors that are no weights, such as {extra[0]}",) if extra else (),
        )

    def read(self, name: str) -> Tensor:
        """See the base class."""
        rule = self._rules[name]
        parts = [self._bundle.read(foreign) for foreign in rule.foreign]
        return rule.form.to_megalm([part.view(_without_width(part.shape)) for part in parts])

    def _dtype(self) -> torch.dtype:
        entries = [self._bundle.entries[name] for rule in self._rules.values() for name in rule.foreign]
        numbers = sorted({entry.dtype for entry in entries})
        dtype = DTYPES.get(numbers[0])
        if len(numbers) > 1 or dtype not in WEIGHT_DTYPES:
            raise CheckpointError(
                f"{self._bundle.index}: weights of TensorFlow's dtypes {numbers}; one of float32 (1), bfloat16 (14), "
                "float16 (19) can be converted"
            )
        return dtype


def open_source(path: Path) -> WeightSource:
    """A folder of OpenAI's GPT-2, opened for reading."""
    return OpenAISource(path)


def rules(model: Model) -> list[Rule]:
    """Where each tensor of the model is."""
    found = [Rule("embedding.weight", ("model/wte",)), Rule("position.weight", ("model/wpe",))]
    for layer in range(model.num_layers):
        here, there = f"blocks.{layer}", f"model/h{layer}"
        found += _norm(f"{here}.attention_norm", f"{there}/ln_1")
        found += _dense(f"{here}.attention.qkv", f"{there}/attn/c_attn")
        found += _dense(f"{here}.attention.projection", f"{there}/attn/c_proj")
        found += _norm(f"{here}.mlp_norm", f"{there}/ln_2")
        found += _dense(f"{here}.mlp.up", f"{there}/mlp/c_fc")
        found += _dense(f"{here}.mlp.down", f"{there}/mlp/c_proj")
    return found + _norm("final_norm", "model/ln_f")


def _without_width(shape: Shape) -> Shape:
    """[1, I, O] as [I, O]: a convolution of width 1 as the dense layer that it is."""
    return tuple(shape[1:]) if len(shape) == 3 and shape[0] == 1 else tuple(shape)


def _norm(ours: str, theirs: str) -> list[Rule]:
    return [Rule(f"{ours}.weight", (f"{theirs}/g",)), Rule(f"{ours}.bias", (f"{theirs}/b",))]


def _dense(ours: str, theirs: str) -> list[Rule]:
    return [Rule(f"{ours}.weight", (f"{theirs}/w",), Transposed()), Rule(f"{ours}.bias", (f"{theirs}/b",))]


def _read_hparams(path: Path) -> Model:
    """The architecture: all that the published sizes differ in."""
    file = safe_file(path, HPARAMS_FILE)
    fields = Fields(file, read_json(file))
    model = Model(
        num_layers=fields.count("n_layer"),
        hidden_size=fields.count("n_embd"),
        num_heads=fields.count("n_head"),
        vocab_size=fields.count("n_vocab"),
        sequence_length=fields.count("n_ctx"),
    )
    fields.check()
    check_architecture(file, model)
    return model
