"""The proof of parity: training on a layout against one process that knows nothing of parallelism.

The reference is plain PyTorch: the whole model in one process, ``cross_entropy`` and ``AdamW`` on fp32 masters; losses
and the gradient norm are summed in fp64, which ``clip_grad_norm_`` on the CPU does not do. A layout is trained by the
engine, the pipeline and the split of batches that users train with. Both see the same synthetic batches, whose loss
masks are uneven, as at the end of a corpus.

Shapes: B global batch, S sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from megalm.config.schema import Config, Optim
from megalm.config.schema import Objective as Settings
from megalm.core.attention.context_parallel import ContextParallel
from megalm.core.documents import Documents
from megalm.core.dtype import DTYPES
from megalm.core.place import Place
from megalm.data.stream.batch import Batch, MakeBatch, Rows, document_starts
from megalm.engine.deepspeed_engine import DeepSpeedEngine
from megalm.engine.micro_batches import training_micro_batches
from megalm.engine.zero import NORM_EPSILON
from megalm.mesh.groups import ParallelContext
from megalm.mesh.topology import Topology
from megalm.models.micro_batch import MicroBatch
from megalm.models.transformer import Transformer, build_full_model, build_transformer
from megalm.objectives.base import Objective
from megalm.objectives.clm import next_tokens
from megalm.objectives.registry import make_objective

_EOS_ID = 0
"""Ends a document of the synthetic batches, where a config's attention restarts at each."""


@dataclass(frozen=True)
class Trace:
    """What a run did, as one process or one rank saw it.

    Attributes:
        losses: mean loss, by step.
        grad_norms: global gradient norm before clipping, by step.
        initial: weights before the first step in fp32, by name; full tensors, NaN where another rank holds them.
        final: the same after the last step.
        terms: the other terms of the objective, by step and name.
    """

    losses: list[float]
    grad_norms: list[float]
    initial: dict[str, Tensor]
    final: dict[str, Tensor]
    terms: list[dict[str, float]] = field(default_factory=list)


class PlainTerms(Protocol):
    """The terms of an objective in plain PyTorch: the mathematics that its parallel form is compared with."""

    def __call__(self, model: Transformer, batch: Batch, place: Place, settings: Settings) -> dict[str, Tensor]:
        """Means over a global batch, ``loss`` first.

        Args:
            model: the whole model.
            batch: the global batch.
            place: where its tokens lie.
            settings: of the objective.
        """


def token_terms(model: Transformer, batch: Batch, place: Place, settings: Settings) -> dict[str, Tensor]:
    """Cross-entropy and z-loss of a language model, from all logits."""
    logits = model(torch.from_numpy(batch.tokens), place).float()  # [B, S, V]
    labels, mask = torch.from_numpy(batch.labels).flatten(), torch.from_numpy(batch.loss_mask).double()
    token_losses = F.cross_entropy(logits.flatten(0, 1), labels, reduction="none")
    tokens = mask.sum().clamp(min=1.0)
    z_loss = (logits.logsumexp(-1).square() * mask).sum() / tokens
    return {"loss": (token_losses * mask.flatten()).sum() / tokens, "z_loss": settings.z_loss * z_loss}


@dataclass(frozen=True)
class Task:
    """What a proof trains.

    Attributes:
        objective: in its parallel form.
        make_batch: makes batches of synthetic rows.
        plain_terms: the same objective in one process.
        prepare: what is done to a model before its engine is made, such as to freeze a part of it.
    """

    objective: Objective
    make_batch: MakeBatch = next_tokens
    plain_terms: PlainTerms = token_terms
    prepare: Callable[[Transformer], object] = lambda _: None

    @classmethod
    def of(cls, config: Config) -> Task:
        """The objective that a config names, on the next tokens of synthetic rows, whatever its own examples are."""
        return cls(make_objective(config.objective))


def synthetic_batch(config: Config, step: int, make_batch: MakeBatch = next_tokens) -> Batch:
    """Random rows, the same for every layout; one row in four breaks off, and one token in ten carries no loss."""
    batch, length, vocab_size = _sizes(config)
    generator = torch.Generator().manual_seed(100 + step)
    rows = torch.randint(0, vocab_size, (batch, length + 1), generator=generator)
    mask = F.pad(torch.rand(batch, length, generator=generator) < 0.9, (1, 0), value=True)
    valid = torch.full((batch,), length)
    valid[3::4] = length // 3
    if config.data.reset_at_documents:
        rows[torch.rand(rows.shape, generator=generator) < 0.2] = _EOS_ID
    samples = np.arange(step * batch, (step + 1) * batch)
    made = make_batch(Rows(rows.numpy(), mask.numpy().astype(np.uint8), valid.numpy()), samples)
    if not config.data.reset_at_documents:
        return made
    return replace(made, document_starts=document_starts(rows[:, :-1].numpy(), _EOS_ID))


def train_plainly(config: Config, *, steps: int | None = None, task: Task | None = None) -> Trace:
    """The reference: ``steps`` (None: all) of a config in this process, whatever layout it names.

    The model computes in the config's number format. Masters are fp32 and begin as the rounded weights, as those of a
    ZeRO optimizer do; fp16 scales its loss by the config's initial scale.
    """
    task = task or Task.of(config)
    dtype, (_, length, vocab_size) = DTYPES[config.engine.dtype], _sizes(config)
    model = build_full_model(
        config.model, vocab_size, objective=task.objective, seed=config.run.seed, dtype=dtype
    ).train()
    task.prepare(model)
    tensors = {t.name: t for t in model.tensors()}
    parameters = {name: t.parameter for name, t in tensors.items() if t.record.trainable}
    masters = {name: p.detach().float().clone().requires_grad_() for name, p in parameters.items()}
    trace = Trace([], [], {name: t.tensor.detach().float().clone() for name, t in tensors.items()}, {})
    optimizer = _plain_adamw(masters.values(), config.optim)
    scale = config.engine.initial_loss_scale if dtype is torch.float16 else 1.0
    for step in range(config.train.steps if steps is None else steps):
        batch = synthetic_batch(config, step, task.make_batch)
        documents = None
        if batch.document_starts is not None:
            documents = Documents.from_starts(torch.from_numpy(batch.document_starts))
        place = Place(torch.arange(length), torch.from_numpy(batch.samples), documents)
        terms = task.plain_terms(model, batch, place, config.objective)
        model.zero_grad()
        (sum(terms.values(), torch.zeros(())) * scale).backward()
        for name, p in parameters.items():
            masters[name].grad = None if p.grad is None else p.grad.float() / scale
        trace.grad_norms.append(_clip(masters.values(), config.optim.clip_grad_norm or math.inf))
        _record(trace, {name: float(value.detach()) for name, value in terms.items()})
        optimizer.step()
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(masters[name])
    trace.final.update({name: t.tensor.detach().float() for name, t in tensors.items()})
    return trace


def _plain_adamw(masters: Iterable[Tensor], optim: Optim) -> torch.optim.AdamW:
    matrices, vectors = [p for p in masters if p.ndim > 1], [p for p in masters if p.ndim == 1]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": optim.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.epsilon,
    )


def _record(trace: Trace, terms: dict[str, float]) -> None:
    trace.losses.append(terms["loss"])
    trace.terms.append({name: value for name, value in terms.items() if name != "loss"})


def _clip(masters: Iterable[Tensor], limit: float) -> float:
    """Scale gradients down to a norm of ``limit``; returns the norm before. The sums are fp64 throughout."""
    gradients = [master.grad for master in masters if master.grad is not None]
    norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))
    for gradient in gradients:
        gradient.mul_(min(1.0, limit / (norm + NORM_EPSILON)))
    return norm


def train_on_layout(config: Config, topology: Topology, task: Task | None = None) -> Trace:
    """All steps of a config on this rank; collective over a gloo world of ``topology.world_size`` ranks."""
    task = task or Task.of(config)
    return train(build_engine(config, ParallelContext.create(topology), task), config, task)


def build_engine(config: Config, context: ParallelContext, task: Task) -> DeepSpeedEngine:
    """This rank's part of a config's model, ready to train."""
    _, _, vocab_size = _sizes(config)
    model = build_transformer(
        config, vocab_size, context=context, dtype=DTYPES[config.engine.dtype], objective=task.objective
    )
    task.prepare(model)
    return DeepSpeedEngine(model, context, config)


def train(engine: DeepSpeedEngine, config: Config, task: Task, *, first: int = 0, steps: int | None = None) -> Trace:
    """``steps`` (None: all) of a config's steps on this rank, from the ``first`` on; collective over all ranks."""
    context, model = engine.context, engine.model
    trace = Trace([], [], _put_in_full(engine), {})
    for step in range(first, config.train.steps if steps is None else first + steps):
        micro_batches = micro_batches_of_rank(config, step, context, model.context_parallel, task)
        result = engine.train_step(micro_batches, config.optim.lr)
        totals = context.world_group.all_reduce(torch.stack([*result.terms.values()]))
        _record(trace, dict(zip(result.terms, totals.tolist(), strict=True)))
        trace.grad_norms.append(float(result.grad_norm))
    trace.final.update(_put_in_full(engine))
    return trace


def micro_batches_of_rank(
    config: Config, step: int, context: ParallelContext, cp: ContextParallel, task: Task | None = None
) -> list[MicroBatch]:
    """This rank's share of a step's synthetic batch, cut as the trainer cuts what its loader gives."""
    own = batch_of_replica(config, step, context, task or Task.of(config))
    micro_batches, _ = training_micro_batches(own, config.train.micro_batch_size, context, cp)
    return micro_batches


def batch_of_replica(config: Config, step: int, context: ParallelContext, task: Task) -> Batch:
    """The rows of a step's synthetic batch that this rank's replica takes."""
    batch = synthetic_batch(config, step, task.make_batch)
    examples = np.arange(len(batch.tokens)).reshape(-1, task.objective.sequences_per_example)
    return batch.take(examples[context.coordinates.dp :: context.topology.dp].reshape(-1))


def _put_in_full(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    """This rank's slices at their places in full tensors that are NaN elsewhere."""
    full = {}
    for t in engine.tensors:
        tensor = torch.full(t.shard.full_shape, math.nan)
        t.shard.put(engine.full_weight(t).float(), tensor)
        full[t.name] = tensor
    return full


def _sizes(config: Config) -> tuple[int, int, int]:
    """Global batch, sequence length and vocabulary."""
    assert config.model.vocab_size is not None, "synthetic data have no vocabulary of their own"
    return config.train.global_batch_size, config.model.sequence_length, config.model.vocab_size
