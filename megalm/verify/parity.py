"""The proof of parity: training on a layout against one process that knows nothing of parallelism.

The reference is plain PyTorch: the whole model in one process, ``cross_entropy`` and ``AdamW`` on fp32 masters; losses
and the gradient norm are summed in fp64, which ``clip_grad_norm_`` on the CPU does not do. A layout is trained by the
engine, the pipeline and the split of batches that users train with. Both see the same synthetic batches, whose loss
masks are uneven, as at the end of a corpus.

Shapes: B global batch, S sequence.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from megalm.config.schema import Config
from megalm.core.attention.context_parallel import ContextParallel
from megalm.core.documents import Documents
from megalm.core.dtype import DTYPES
from megalm.core.place import Place
from megalm.data.stream.batch import Batch, document_starts
from megalm.engine.deepspeed_engine import DeepSpeedEngine
from megalm.engine.micro_batches import training_micro_batches
from megalm.engine.zero import NORM_EPSILON
from megalm.mesh.groups import ParallelContext
from megalm.mesh.topology import Topology
from megalm.models.micro_batch import MicroBatch
from megalm.models.transformer import build_full_model, build_transformer
from megalm.objectives.registry import make_objective

_EOS_ID = 0
"""Ends a document of the synthetic batches, where a config's attention begins anew with each."""


@dataclass(frozen=True)
class Trace:
    """What a run did, as one process or one rank saw it.

    Attributes:
        losses: mean loss per token, by step.
        grad_norms: global gradient norm before clipping, by step.
        initial: weights before the first step in fp32, by name; full tensors, NaN where another rank holds them.
        final: the same after the last step.
    """

    losses: list[float]
    grad_norms: list[float]
    initial: dict[str, Tensor]
    final: dict[str, Tensor]


@dataclass(frozen=True)
class GlobalBatch:
    """What all replicas together see in one step.

    Attributes:
        tokens: [B, S] int64.
        labels: [B, S] int64.
        loss_mask: [B, S] fp32.
        samples: [B] int64, numbers of the rows, which key their dropout masks.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    samples: Tensor


def synthetic_batch(config: Config, step: int) -> GlobalBatch:
    """Random tokens, the same for every layout; one row in four breaks off, and one token in ten carries no loss."""
    batch, length, vocab_size = _sizes(config)
    generator = torch.Generator().manual_seed(100 + step)
    rows = torch.randint(0, vocab_size, (batch, length + 1), generator=generator)
    mask = (torch.rand(batch, length, generator=generator) < 0.9).float()
    mask[3::4, length // 3 :] = 0.0
    if config.data.reset_at_documents:
        rows[torch.rand(rows.shape, generator=generator) < 0.2] = _EOS_ID
    samples = torch.arange(step * batch, (step + 1) * batch)
    return GlobalBatch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), mask, samples)


def train_plainly(config: Config, *, steps: int | None = None) -> Trace:
    """The reference: ``steps`` (None: all) of a config in this process, whatever layout it names.

    The model computes in the config's number format. Masters are fp32 and begin as the rounded weights, as those of a
    ZeRO optimizer do; fp16 scales its loss by the config's initial scale.
    """
    optim, dtype = config.optim, DTYPES[config.engine.dtype]
    _, length, vocab_size = _sizes(config)
    model = build_full_model(config.model, vocab_size, seed=config.run.seed, dtype=dtype).train()
    parameters = dict(model.named_parameters())
    masters = {name: p.detach().float().clone().requires_grad_() for name, p in parameters.items()}
    initial = {name: master.detach().clone() for name, master in masters.items()}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in masters.values() if p.ndim > 1], "weight_decay": optim.weight_decay},
            {"params": [p for p in masters.values() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.epsilon,
    )
    scale = config.engine.initial_loss_scale if dtype is torch.float16 else 1.0
    limit = optim.clip_grad_norm or math.inf
    losses, norms = [], []
    for step in range(config.train.steps if steps is None else steps):
        batch = synthetic_batch(config, step)
        documents = None
        if config.data.reset_at_documents:
            documents = Documents.from_starts(torch.from_numpy(document_starts(batch.tokens.numpy(), _EOS_ID)))
        logits = model(batch.tokens, Place(torch.arange(length), batch.samples, documents)).float()  # [B, S, V]
        token_losses = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none")
        mask = batch.loss_mask.double()
        tokens = mask.sum().clamp(min=1.0)
        loss = (token_losses * mask.flatten()).sum() / tokens
        z_loss = (logits.logsumexp(-1).square() * mask).sum() / tokens
        model.zero_grad()
        ((loss + config.objective.z_loss * z_loss) * scale).backward()
        for name, p in parameters.items():
            masters[name].grad = None if p.grad is None else p.grad.float() / scale
        norms.append(_clip(masters.values(), limit))
        losses.append(float(loss.detach()))
        optimizer.step()
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(masters[name])
    return Trace(losses, norms, initial, {name: p.detach().float() for name, p in parameters.items()})


def _clip(masters: Iterable[Tensor], limit: float) -> float:
    """Scale gradients down to a norm of ``limit``; returns the norm before. The sums are fp64 throughout."""
    gradients = [master.grad for master in masters if master.grad is not None]
    norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))
    for gradient in gradients:
        gradient.mul_(min(1.0, limit / (norm + NORM_EPSILON)))
    return norm


def train_on_layout(config: Config, topology: Topology) -> Trace:
    """All steps of a config on this rank; collective over a gloo world of ``topology.world_size`` ranks."""
    context = ParallelContext.create(topology)
    _, _, vocab_size = _sizes(config)
    objective = make_objective(config.objective)
    model = build_transformer(
        config, vocab_size, context=context, dtype=DTYPES[config.engine.dtype], objective=objective
    )
    engine = DeepSpeedEngine(model, context, config)
    initial = _put_in_full(engine)
    losses, norms = [], []
    for step in range(config.train.steps):
        result = engine.train_step(
            micro_batches_of_rank(config, step, context, model.context_parallel), config.optim.lr
        )
        loss = torch.tensor([result.terms["loss"]], dtype=torch.float64)
        losses.append(float(context.world_group.all_reduce(loss)))
        norms.append(result.grad_norm)
    return Trace(losses, norms, initial, _put_in_full(engine))


def micro_batches_of_rank(config: Config, step: int, context: ParallelContext, cp: ContextParallel) -> list[MicroBatch]:
    """This rank's share of a step's synthetic batch, cut as the trainer cuts what its loader gives."""
    batch = synthetic_batch(config, step)
    mine = slice(context.coordinates.dp, None, context.topology.dp)
    tokens, labels, loss_mask, samples = (
        whole[mine].numpy() for whole in (batch.tokens, batch.labels, batch.loss_mask, batch.samples)
    )
    starts = document_starts(tokens, _EOS_ID) if config.data.reset_at_documents else None
    micro_batches, _ = training_micro_batches(
        Batch(tokens, labels, loss_mask, samples, starts), config.train.micro_batch_size, context, cp
    )
    return micro_batches


def _put_in_full(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    """This rank's slices at their places in full tensors that are NaN elsewhere."""
    full = {}
    for p in engine.parameters:
        tensor = torch.full(p.shard.full_shape, math.nan)
        p.shard.put(engine.full_weight(p).float(), tensor)
        full[p.name] = tensor
    return full


@dataclass(frozen=True)
class Differences:
    """How far a layout is from the reference.

    Attributes:
        loss: largest difference of any step on any rank.
        grad_norm: the same of the gradient norm, relative where the norm is above 1.
        weights: largest difference of any element after the last step.
        initial_weights: the same before the first step.
        copies: largest difference between two ranks' copies of an element, or their reported losses.
        missing: elements of the model that no rank holds.
        untrained: parameters that the reference changed and the layout left as they were.
    """

    loss: float
    grad_norm: float
    weights: float
    initial_weights: float
    copies: float
    missing: int
    untrained: tuple[str, ...]


def differences(want: Trace, per_rank: Sequence[Trace]) -> Differences:
    """Compare what the ranks of a layout saw with the reference; whatever is not a number is infinitely far."""
    initial, initial_copies = _assemble([trace.initial for trace in per_rank])
    final, final_copies = _assemble([trace.final for trace in per_rank])
    reported = [_largest(trace.losses, per_rank[0].losses) for trace in per_rank]
    return Differences(
        loss=max(_largest(trace.losses, want.losses) for trace in per_rank),
        grad_norm=max(_largest(trace.grad_norms, want.grad_norms, relative=True) for trace in per_rank),
        weights=_furthest(final, want.final),
        initial_weights=_furthest(initial, want.initial),
        copies=max(initial_copies, final_copies, *reported),
        missing=sum(
            int(initial[name].isnan().sum()) if name in initial else full.numel() for name, full in want.initial.items()
        ),
        untrained=tuple(
            name
            for name, before in want.initial.items()
            if not torch.equal(before, want.final[name])
            and name in final
            and torch.equal(initial[name].nan_to_num(), final[name].nan_to_num())
        ),
    )


def _assemble(per_rank: Sequence[dict[str, Tensor]]) -> tuple[dict[str, Tensor], float]:
    """Full parameters from every rank's slices, and the largest difference between copies of the same element."""
    full: dict[str, Tensor] = {}
    furthest = 0.0
    for tensors in per_rank:
        for name, tensor in tensors.items():
            known = full.setdefault(name, torch.full_like(tensor, math.nan))
            both = ~known.isnan() & ~tensor.isnan()
            if bool(both.any()):
                furthest = max(furthest, float((known[both] - tensor[both]).abs().max()))
            held = ~tensor.isnan()
            known[held] = tensor[held]
    return full, furthest


def _furthest(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    if got.keys() != want.keys():
        return math.inf
    return max(_finite(float((got[name] - want[name]).abs().max())) for name in want)


def _largest(got: Sequence[float], want: Sequence[float], *, relative: bool = False) -> float:
    return max(
        _finite(abs(mine - theirs) / (max(1.0, abs(theirs)) if relative else 1.0))
        for mine, theirs in zip(got, want, strict=True)
    )


def _finite(difference: float) -> float:
    return difference if math.isfinite(difference) else math.inf


def _sizes(config: Config) -> tuple[int, int, int]:
    """Global batch, sequence length and vocabulary."""
    assert config.model.vocab_size is not None, "synthetic data have no vocabulary of their own"
    return config.train.global_batch_size, config.model.sequence_length, config.model.vocab_size
