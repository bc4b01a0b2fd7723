"""Greedy generation beside Hugging Face's: a 124 M GPT-2 with the same random weights, dtype, threads and prompts.

Beside it what a rank holds meanwhile (``share.py``), and evaluation beside lm-evaluation-harness's (``score.py``).

Both generate in turn and ratios are medians of the pairs. Both clocks are read when the first token of every text is
known, and at the end. The weights are random, so texts never end early, and what is computed does not depend on what
they are.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import score, share
from benchmarks.table import Report, Row

PROMPT = 512
_DECODE_TARGETS = {1: 1.0, 16: 1.3}


@dataclass(frozen=True)
class Options:
    """How long to measure."""

    rounds: int = 3
    new_tokens: int = 128
    threads: int = os.cpu_count() or 1


def run(options: Options) -> Report:
    """Measure memory and likelihoods, and generation in both formats at both batch sizes."""
    import torch

    torch.set_num_threads(options.threads)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="megalm-bench-") as folder:
        _write_library_model(Path(folder))
        converted = _converted(Path(folder))
        rows += share.rows(converted)
        if importlib.util.find_spec("lm_eval") is not None:  # the extra harness
            rows += score.rows(Path(folder), converted, options.rounds)
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            for batch in _DECODE_TARGETS:
                rows += _paired(options, Path(folder), name, dtype, batch)
    return Report("generate", rows)


def _write_library_model(folder: Path) -> None:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    transformers.AutoModelForCausalLM.from_config(transformers.GPT2Config()).save_pretrained(folder)
    _tokenizer().save(folder)


def _converted(folder: Path) -> Path:
    """The same model as a run of megalm's."""
    from megalm.cli.main import main

    run = folder / "as-megalm"
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["convert", "--from", "hf", "--to", "megalm", str(folder), str(run)]) == 0
    return run


def _paired(options: Options, folder: Path, name: str, dtype: Any, batch: int) -> list[Row]:
    import torch

    prompts = torch.randint(50000, (batch, PROMPT), generator=torch.Generator().manual_seed(1))
    ours, theirs = _megalm(folder, dtype, batch), _library(folder, dtype)
    pairs = []
    for each in (ours, theirs):  # what is made once: threads, buffers
        each(prompts[:, :8], 2)
    for _ in range(options.rounds):
        pairs.append((ours(prompts, options.new_tokens), theirs(prompts, options.new_tokens)))
    further = batch * (options.new_tokens - 1)
    first = [theirs.first / ours.first for ours, theirs in pairs]
    decode = [theirs.further / ours.further for ours, theirs in pairs]
    whole = [theirs.all / ours.all for ours, theirs in pairs]
    rate = statistics.median(further / ours.further for ours, _ in pairs)
    place = f"{name}, batch {batch}"
    note = "Hugging Face's time / megalm's"
    return [
        Row(f"{place}: time to first token", statistics.median(first), "×", target=1.0, note=note),
        Row(f"{place}: further tokens", statistics.median(decode), "×", target=_DECODE_TARGETS[batch], note=note),
        Row(f"{place}: all of {options.new_tokens} tokens", statistics.median(whole), "×", note=note),
        Row(f"{place}: further tokens", rate, "tokens/s"),
    ]


@dataclass(frozen=True)
class _Seconds:
    """Of one generation.

    Attributes:
        first: until every text has its first token.
        all: until all have ended.
    """

    first: float
    all: float

    @property
    def further(self) -> float:
        """Of all tokens but the first ones."""
        return self.all - self.first


def _megalm(folder: Path, dtype: Any, batch: int) -> Callable[[Any, int], _Seconds]:
    from megalm.convert.huggingface.read import HfSource
    from megalm.generate.engine import Engine
    from megalm.generate.one_row import lay_out_for_one_row
    from megalm.generate.requests import GenerateRequest, Sampling
    from megalm.generate.units import SampleUnit
    from megalm.mesh.groups import ParallelContext
    from megalm.models.transformer import build_full_model

    source = HfSource(folder)
    words = source.info.model.vocab_size or 0
    model = build_full_model(source.info.model, words, dtype=dtype).eval()
    for tensor in model.tensors():
        tensor.tensor.data.copy_(source.read(tensor.name))
    if batch == 1:
        lay_out_for_one_row(model)
    engine = Engine(model, ParallelContext.single(), words=words, batch_size=batch)
    greedy, tokenizer = Sampling(temperature=0.0), _tokenizer()

    class Clocked(SampleUnit):
        """Remembers when its first token was known."""

        first = 0.0

        def accept(self, results: Any) -> list[int]:
            self.first = self.first or time.perf_counter()
            return super().accept(results)

    def generate(prompts: Any, count: int) -> _Seconds:
        started = time.perf_counter()
        requests = [
            GenerateRequest(tokens=tuple(row), max_new_tokens=count, sampling=greedy, ends=False)
            for row in prompts.tolist()
        ]
        longest = source.info.model.sequence_length
        units = [Clocked(number, request, tokenizer, longest) for number, request in enumerate(requests)]
        assert sum(1 for _ in engine.generate(units)) == len(units)
        return _Seconds(max(unit.first for unit in units) - started, time.perf_counter() - started)

    return generate


def _library(folder: Path, dtype: Any) -> Callable[[Any, int], _Seconds]:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    def generate(prompts: Any, count: int) -> _Seconds:
        known: list[float] = []

        def clock(tokens: Any, scores: Any, **_: Any) -> Any:  # noqa: ARG001 - a hook
            known.append(time.perf_counter())
            return torch.zeros(len(tokens), dtype=torch.bool)

        started = time.perf_counter()
        with torch.inference_mode():
            made = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
                stopping_criteria=transformers.StoppingCriteriaList([clock]),
            )
        assert made.shape[1] == prompts.shape[1] + count
        return _Seconds(known[0] - started, time.perf_counter() - started)

    return generate


def _tokenizer() -> Any:
    """Texts are not decoded here, and end at no token: any tokenizer does."""
    from megalm.data.tokenization.training import train_byte_level_bpe

    return train_byte_level_bpe(["a"], 260)
