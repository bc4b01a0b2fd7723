"""Greedy generation beside Hugging Face's: a 124 M GPT-2 with the same random weights, dtype, threads and prompts.

Both generate in turn and ratios are medians of the pairs. Time to first token is that of one new token; what a further
one takes is the rest of a longer text divided by its tokens. The weights are random, so texts never end early, and what
is computed does not depend on what they are.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    """Measure both formats at both batch sizes."""
    import torch

    torch.set_num_threads(options.threads)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="megalm-bench-") as folder:
        _write_library_model(Path(folder))
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            for batch in _DECODE_TARGETS:
                rows += _paired(options, Path(folder), name, dtype, batch)
    return Report("generate", rows)


def _write_library_model(folder: Path) -> None:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    transformers.AutoModelForCausalLM.from_config(transformers.GPT2Config()).save_pretrained(folder)


def _paired(options: Options, folder: Path, name: str, dtype: Any, batch: int) -> list[Row]:
    import torch

    prompts = torch.randint(50000, (batch, PROMPT), generator=torch.Generator().manual_seed(1))
    ours, theirs = _megalm(folder, dtype, batch), _library(folder, dtype)
    pairs = []
    for _ in range(options.rounds):
        seconds = [each(prompts, count) for count in (1, options.new_tokens) for each in (ours, theirs)]
        pairs.append(seconds)
    further = options.new_tokens - 1
    first = [their_first / our_first for our_first, their_first, _, _ in pairs]
    decode = [(theirs - their_first) / (ours - our_first) for our_first, their_first, ours, theirs in pairs]
    whole = [theirs / ours for _, _, ours, theirs in pairs]
    rate = statistics.median(batch * further / (ours - our_first) for our_first, _, ours, _ in pairs)
    place = f"{name}, batch {batch}"
    note = "Hugging Face's time / megalm's"
    return [
        Row(f"{place}: time to first token", statistics.median(first), "×", target=1.0, note=note),
        Row(f"{place}: further tokens", statistics.median(decode), "×", target=_DECODE_TARGETS[batch], note=note),
        Row(f"{place}: all of {options.new_tokens} tokens", statistics.median(whole), "×", note=note),
        Row(f"{place}: further tokens", rate, "tokens/s"),
    ]


def _megalm(folder: Path, dtype: Any, batch: int) -> Callable[[Any, int], float]:
    from megalm.convert.huggingface.read import HfSource
    from megalm.generate.engine import Engine
    from megalm.generate.one_row import lay_out_for_one_row
    from megalm.generate.requests import GenerateRequest, Sampling
    from megalm.generate.units import make_unit
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

    def generate(prompts: Any, count: int) -> float:
        started = time.perf_counter()
        requests = [
            GenerateRequest(tokens=tuple(row), max_new_tokens=count, sampling=greedy, ends=False)
            for row in prompts.tolist()
        ]
        longest = source.info.model.sequence_length
        units = [make_unit(number, request, tokenizer, longest) for number, request in enumerate(requests)]
        assert sum(1 for _ in engine.generate(units)) == len(units)
        return time.perf_counter() - started

    return generate


def _library(folder: Path, dtype: Any) -> Callable[[Any, int], float]:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    def generate(prompts: Any, count: int) -> float:
        started = time.perf_counter()
        with torch.inference_mode():
            made = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )
        assert made.shape[1] == PROMPT + count
        return time.perf_counter() - started

    return generate


def _tokenizer() -> Any:
    """Texts are not decoded here, and end at no token: any tokenizer does."""
    from megalm.data.tokenization.training import train_byte_level_bpe

    return train_byte_level_bpe(["a"], 260)
