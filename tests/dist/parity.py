"""The proof of parity: training on any layout against one process that knows nothing of parallelism.

The reference is plain PyTorch: the whole model in one process, ``cross_entropy``, ``clip_grad_norm_`` and ``AdamW``.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace

import torch
from torch.nn import functional as F

from megalm.config.schema import Config, Data, Engine, Model, Optim, Parallel, Run, Train

STEPS = 6
LEARNING_RATE = 1e-3
GLOBAL_BATCH = 16
CLIP = 0.5
"""Below every gradient norm of these six steps: clipping is active throughout."""

MODEL = Model(num_layers=4, hidden_size=32, num_heads=4, sequence_length=16, vocab_size=61)
"""A vocabulary that neither 2 nor 4 divides, so that the last rank's rows are padded."""


@dataclass(frozen=True)
class Layout:
    """Degrees and engine of one case."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    dtype: str = "fp32"
    zero_stage: int = 1
    schedule: str = "1f1b"
    model: Model = field(default=MODEL)

    def __str__(self) -> str:
        model = "" if self.model == MODEL else "·variant"
        return f"tp{self.tp}·pp{self.pp}·dp{self.dp}·{self.schedule}·zero{self.zero_stage}·{self.dtype}{model}"

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    def config(self) -> Config:
        return Config(
            run=Run(name="parity", seed=7),
            model=self.model,
            data=Data(path="unused"),
            optim=Optim(lr=LEARNING_RATE, clip_grad_norm=CLIP),
            train=Train(steps=STEPS, micro_batch_size=2, global_batch_size=GLOBAL_BATCH),
            parallel=Parallel(tp=self.tp, pp=self.pp, schedule=self.schedule),
            engine=Engine(dtype=self.dtype, zero_stage=self.zero_stage),
        )


@dataclass(frozen=True)
class Trace:
    """What one rank saw: losses and gradient norms by step, and its slices of the weights before and after, at their
    places in full tensors."""

    losses: list[float]
    grad_norms: list[float]
    initial: dict[str, torch.Tensor]
    final: dict[str, torch.Tensor]


def batch(step: int, model: Model) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, labels and loss mask of the global batch; the mask is uneven over samples, as at the end of a corpus."""
    generator = torch.Generator().manual_seed(100 + step)
    rows = torch.randint(0, model.vocab_size, (GLOBAL_BATCH, model.sequence_length + 1), generator=generator)
    mask = (torch.rand(GLOBAL_BATCH, model.sequence_length, generator=generator) < 0.9).float()
    mask[3, 5:] = 0.0
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), mask


def reference(layout: Layout) -> Trace:
    """Six steps in one process, in fp32 (or, for bf16 cases, the same: their tolerance is wide)."""
    from megalm.models.gpt import build_full_model

    config = replace(layout, tp=1, pp=1, dp=1).config()
    model = build_full_model(config.model, config.model.vocab_size, seed=config.run.seed)
    initial = {name: p.detach().clone() for name, p in model.named_parameters()}
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": config.optim.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=LEARNING_RATE,
        betas=(config.optim.beta1, config.optim.beta2),
        eps=config.optim.epsilon,
    )
    losses, norms = [], []
    for step in range(STEPS):
        tokens, labels, mask = batch(step, config.model)
        token_losses = F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten(), reduction="none")
        loss = (token_losses * mask.flatten()).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        losses.append(float(loss.detach()))
        optimizer.step()
    return Trace(losses, norms, initial, {name: p.detach().clone() for name, p in model.named_parameters()})


def train_on_ranks(layouts: list[Layout]) -> list[Trace]:
    """Runs on every rank of one world: each layout in turn, through the engine that users train with."""
    return [_train(layout) for layout in layouts]


def _train(layout: Layout) -> Trace:
    import torch.distributed as dist

    from megalm.core.groups import ParallelContext
    from megalm.engine.deepspeed_engine import DeepSpeedEngine
    from megalm.models.gpt import MicroBatch, build_gpt
    from megalm.topology import Topology

    config = layout.config()
    context = ParallelContext.create(Topology(tp=layout.tp, pp=layout.pp, dp=layout.dp))
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[layout.dtype]
    stage = build_gpt(config, config.model.vocab_size, context=context, dtype=dtype)
    engine = DeepSpeedEngine(stage, context, config)
    initial = _put_in_full(engine)
    losses, norms = [], []
    for step in range(STEPS):
        tokens, labels, mask = batch(step, config.model)
        mine = slice(context.coordinates.dp, None, layout.dp)
        weight = mask * layout.dp / mask.sum()
        micro = [
            MicroBatch(*parts)
            for parts in zip(tokens[mine].split(2), labels[mine].split(2), weight[mine].split(2), strict=True)
        ]
        result = engine.train_step(micro, LEARNING_RATE)
        loss = torch.tensor([result.loss_sum], dtype=torch.float64)
        dist.all_reduce(loss)
        losses.append(float(loss.detach()))
        norms.append(result.grad_norm)
    return Trace(losses, norms, initial, _put_in_full(engine))


def _put_in_full(engine) -> dict[str, torch.Tensor]:
    """This rank's slices at their places in full tensors that are NaN elsewhere."""
    full = {}
    for p in engine.parameters:
        tensor = torch.full(p.shard.full_shape, float("nan"))
        p.shard.put(p.parameter.detach().float(), tensor)
        full[p.name] = tensor
    return full


def assemble(per_rank: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Full parameters from every rank's slices; copies of the same element must agree to the last bit."""
    full: dict[str, torch.Tensor] = {}
    for tensors in per_rank:
        for name, tensor in tensors.items():
            known = full.setdefault(name, torch.full_like(tensor, float("nan")))
            both = ~known.isnan() & ~tensor.isnan()
            assert torch.equal(known[both], tensor[both]), f"{name}: copies differ between ranks"
            known[~tensor.isnan()] = tensor[~tensor.isnan()]
    return full


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """A hash over names and bits."""
    hasher = hashlib.sha256()
    for name in sorted(tensors):
        hasher.update(name.encode())
        hasher.update(tensors[name].contiguous().numpy().tobytes())
    return hasher.hexdigest()
