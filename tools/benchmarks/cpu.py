"""Training on one CPU process: megalm's engine against Hugging Face's GPT-2, and against what the machine can multiply.

Each competitor is a process of its own with the same number of threads, and only one of them works at a time: they
step in turn, so that whatever else the machine does hits all alike. Ratios are medians over rounds of one competitor's
time by the other's in the same round.

megalm runs with the malloc settings that its launcher gives to ranks; Hugging Face runs once with what a plain
``python train.py`` has, and once with megalm's settings.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.table import Report, Row
from megalm.config.schema import Config, Data, Engine, Model, Optim, Run, Train
from megalm.launch.local import KEEPS_MEMORY
from megalm.models.counts import flops_per_token

BATCH = 8
MODEL = Model(num_layers=6, hidden_size=384, num_heads=6, sequence_length=512, vocab_size=8192)
MATMUL_SHAPES = ((4096, 384, 1536), (4096, 1536, 384), (4096, 384, 8192), (1024, 1024, 1024), (2048, 2048, 2048))
"""(rows, inner, columns): those of the model, and square ones."""

SPEEDUP_TARGET = 1.5
SHARE_TARGET = 0.40


@dataclass(frozen=True)
class Options:
    """How long to measure.

    Attributes:
        rounds: in each, every competitor makes one step.
        warm_up: steps that are not counted.
        threads: of each competitor.
        compiled: whether megalm compiles its blocks too.
    """

    rounds: int = 15
    warm_up: int = 3
    threads: int = 2
    compiled: bool = False


def run(options: Options) -> Report:
    """Time all competitors in turn."""
    competitors = {
        "megalm": _Worker("megalm", options.threads, KEEPS_MEMORY),
        "hf": _Worker("huggingface", options.threads, {}),
        "hf_malloc": _Worker("huggingface", options.threads, KEEPS_MEMORY),
        "matmul": _Worker("matmul", options.threads, {}),
    }
    if options.compiled:
        competitors["megalm_compiled"] = _Worker("megalm_compiled", options.threads, KEEPS_MEMORY)
    try:
        for worker in competitors.values():
            for _ in range(options.warm_up):
                worker.step()
        rounds = [{name: worker.step() for name, worker in competitors.items()} for _ in range(options.rounds)]
    finally:
        for worker in competitors.values():
            worker.end()
    return Report("cpu", _rows(rounds))


def _rows(rounds: list[dict[str, float]]) -> list[Row]:
    """Medians over rounds; ``matmul`` is TFLOP/s, everything else seconds per step."""
    tokens = BATCH * MODEL.sequence_length
    rate = max(figures["matmul"] for figures in rounds)
    median = {name: statistics.median(figures[name] for figures in rounds) for name in rounds[0]}
    words = {
        "megalm": "megalm, engine step",
        "megalm_compiled": "megalm, engine.compile",
        "hf": "Hugging Face GPT-2, bf16 autocast, torch.compile, fused AdamW",
        "hf_malloc": "the same with megalm's malloc settings",
    }
    rows = [
        Row(words[name], tokens / seconds, "tokens/s", note=f"best {tokens / min(f[name] for f in rounds):,.0f}")
        for name, seconds in median.items()
        if name in words
    ]

    def ratio(name: str, to: str) -> float:
        return statistics.median(figures[name] / figures[to] for figures in rounds)

    rows.append(Row("megalm / Hugging Face", ratio("hf", "megalm"), "×", SPEEDUP_TARGET))
    rows.append(Row("megalm / Hugging Face with malloc settings", ratio("hf_malloc", "megalm"), "×"))
    rows.append(Row("bf16 matmul, best shape and round", rate, "TFLOP/s"))
    flops = flops_per_token(MODEL) * tokens
    rows.append(Row("megalm's share of it", flops / median["megalm"] / rate / 1e12, "", SHARE_TARGET))
    rows.append(Row("Hugging Face's share of it", flops / median["hf"] / rate / 1e12))
    return rows


class _Worker:
    """A competitor in its own process, which steps on command."""

    def __init__(self, kind: str, threads: int, environment: dict[str, str]) -> None:
        tools = Path(__file__).resolve().parents[1]
        path = os.pathsep.join([str(tools), str(tools.parent), os.environ.get("PYTHONPATH", "")])
        bare = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.cpu", kind, str(threads)],
            env={**bare, **environment, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._read()  # built

    def step(self) -> float:
        """Make one step; returns what it measured."""
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        return self._read()

    def end(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()

    def _read(self) -> float:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("figure "):
                return float(json.loads(line.removeprefix("figure ")))
        raise RuntimeError(f"a competitor ended with exit code {self._process.wait()}; its error is above")


def _serve(kind: str, threads: int) -> None:
    """Build a competitor and step whenever a line arrives."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    step = {
        "megalm": lambda: _megalm(compiled=False),
        "megalm_compiled": lambda: _megalm(compiled=True),
        "huggingface": _hugging_face,
        "matmul": _matmul,
    }[kind]()
    print("figure 0", flush=True)
    for _ in sys.stdin:
        print(f"figure {step()}", flush=True)


def bench_config(model: Model, *, micro_batch_size: int, global_batch_size: int, compiled: bool = False) -> Config:
    """What a user would write for one process: bf16 with ZeRO-1."""
    return Config(
        run=Run(name="bench"),
        model=model,
        data=Data(path="unused"),
        optim=Optim(lr=1e-4),
        train=Train(steps=1, micro_batch_size=micro_batch_size, global_batch_size=global_batch_size),
        engine=Engine(dtype="bf16", zero_stage=1, compile=compiled),
    )


def _megalm(*, compiled: bool) -> Callable[[], float]:
    import torch
    import torch.distributed as dist

    from megalm.core.place import Place
    from megalm.engine.deepspeed_engine import DeepSpeedEngine
    from megalm.mesh.groups import ParallelContext
    from megalm.mesh.topology import Topology
    from megalm.models.micro_batch import MicroBatch
    from megalm.models.transformer import build_transformer
    from megalm.objectives.registry import make_objective

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    config = bench_config(MODEL, micro_batch_size=BATCH, global_batch_size=BATCH, compiled=compiled)
    context = ParallelContext.create(Topology())
    stage = build_transformer(
        config, 8192, context=context, dtype=torch.bfloat16, objective=make_objective(config.objective)
    )
    engine = DeepSpeedEngine(stage, context, config)
    weight = torch.full((BATCH, MODEL.sequence_length), 1.0 / (BATCH * MODEL.sequence_length))
    place = Place(torch.arange(MODEL.sequence_length), torch.arange(BATCH))

    def step() -> float:
        rows = torch.randint(0, 8192, (BATCH, MODEL.sequence_length + 1))
        micro_batch = MicroBatch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), weight, place)
        started = time.perf_counter()
        engine.train_step([micro_batch], 1e-4)
        return time.perf_counter() - started

    return step


def _hugging_face() -> Callable[[], float]:
    """The same model, step and clipping as a user of transformers would write them for speed."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=8192,
            n_positions=MODEL.sequence_length,
            n_embd=MODEL.hidden_size,
            n_layer=MODEL.num_layers,
            n_head=MODEL.num_heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
            bos_token_id=0,
            eos_token_id=0,
        )
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    compiled = torch.compile(model)

    def step() -> float:
        tokens = torch.randint(0, 8192, (BATCH, MODEL.sequence_length))
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss = compiled(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        float(loss.detach())
        return time.perf_counter() - started

    return step


def _matmul() -> Callable[[], float]:
    """The highest rate of any shape, in TFLOP/s."""
    import torch

    operands = [
        (torch.randn(m, k, dtype=torch.bfloat16), torch.randn(k, n, dtype=torch.bfloat16)) for m, k, n in MATMUL_SHAPES
    ]
    results = [a @ b for a, b in operands]

    def step() -> float:
        best = 0.0
        for (a, b), result in zip(operands, results, strict=True):
            for _ in range(4):
                started = time.perf_counter()
                torch.mm(a, b, out=result)
                best = max(best, 2e-12 * a.numel() * b.shape[1] / (time.perf_counter() - started))
        return best

    return step


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]))
