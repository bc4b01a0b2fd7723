"""The proof of parity: training on any layout against one process that knows nothing of parallelism.

The reference is plain PyTorch: the whole model in one process, ``cross_entropy``, ``clip_grad_norm_`` and ``AdamW`` on
fp32 masters.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, fields, replace

import torch
from torch.nn import functional as F

from megalm.config.schema import Config, Data, Engine, Model, Objective, Optim, Parallel, Run, Train

STEPS = 6
GLOBAL_BATCH = 16
CLIP = 0.2
"""Below every gradient norm of these six steps: clipping is active throughout."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MODEL = Model(num_layers=4, hidden_size=32, num_heads=4, sequence_length=16, vocab_size=61)
"""A vocabulary that neither 2 nor 4 divides, so that the last rank's rows are padded."""


@dataclass(frozen=True)
class Layout:
    """Degrees, schedule, engine and model of one case."""

    tp: int = 1
    sp: bool = False
    pp: int = 1
    v: int = 1
    cp: int = 1
    cp_attention: str = "ulysses"
    dp: int = 1
    schedule: str = "1f1b"
    stage_layers: tuple[int, ...] | None = None
    dtype: str = "fp32"
    zero_stage: int = 1
    offload: bool = False
    recompute: str = "none"
    recompute_every: int = 1
    compile: bool = False
    z_loss: float = 0.0
    model: Model = field(default=MODEL)
    name: str = ""
    """What is special about the model."""

    def __str__(self) -> str:
        degrees = f"tp{self.tp}{'+sp' * self.sp}·pp{self.pp}·dp{self.dp}"
        parts = [degrees, self.schedule, f"zero{self.zero_stage}", self.dtype]
        default = Layout()
        parts += [
            f"{item.name}={getattr(self, item.name)}"
            for item in fields(self)
            if item.name in ("v", "stage_layers", "offload", "recompute", "recompute_every", "compile", "z_loss")
            and getattr(self, item.name) != getattr(default, item.name)
        ]
        if self.cp > 1:
            parts.append(f"cp{self.cp}-{self.cp_attention}")
        return "·".join([*parts, self.name] if self.name else parts)

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def learning_rate(self) -> float:
        """At 1e-3 Adam alone turns the rounding of fp32 gradients into steps of 2e-5; 16-bit weights need it to move."""
        return 1e-4 if self.dtype == "fp32" else 1e-3

    @property
    def reference(self) -> Layout:
        """The same computation in one process; layouts that share it share a reference run."""
        return Layout(dtype=self.dtype, z_loss=self.z_loss, model=self.model)

    def config(self) -> Config:
        return Config(
            run=Run(name="parity", seed=7),
            model=self.model,
            data=Data(path="unused"),
            objective=Objective(z_loss=self.z_loss),
            optim=Optim(lr=self.learning_rate, clip_grad_norm=CLIP),
            train=Train(steps=STEPS, micro_batch_size=2, global_batch_size=GLOBAL_BATCH),
            parallel=Parallel(
                tp=self.tp,
                pp=self.pp,
                cp=self.cp,
                virtual_stages=self.v,
                schedule=self.schedule,
                stage_layers=self.stage_layers,
                sequence_parallel=self.sp,
                cp_attention=self.cp_attention,
            ),
            engine=Engine(
                dtype=self.dtype,
                zero_stage=self.zero_stage,
                offload_optimizer=self.offload,
                recompute=self.recompute,
                recompute_every=self.recompute_every,
                compile=self.compile,
                bucket_mib=0.02,  # several buckets even for a model this small
                loss_chunk_tokens=12,  # several chunks, the last one shorter
                initial_loss_scale=1024.0,
            ),
        )


@dataclass(frozen=True)
class Trace:
    """What one rank saw: losses and gradient norms by step, and its slices of the weights before and after, at their
    places in full tensors."""

    losses: list[float]
    grad_norms: list[float]
    initial: dict[str, torch.Tensor]
    final: dict[str, torch.Tensor]


def batch(step: int, model: Model) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, labels, loss mask and sample numbers of the global batch; the mask is uneven, as at a corpus's end."""
    generator = torch.Generator().manual_seed(100 + step)
    rows = torch.randint(0, model.vocab_size, (GLOBAL_BATCH, model.sequence_length + 1), generator=generator)
    mask = (torch.rand(GLOBAL_BATCH, model.sequence_length, generator=generator) < 0.9).float()
    mask[3, 5:] = 0.0
    samples = torch.arange(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), mask, samples


def reference(layout: Layout) -> Trace:
    """Six steps in one process: a model in the layout's dtype, fp32 masters, and for fp16 a constant loss scale."""
    from megalm.core.place import Place
    from megalm.models.gpt import build_full_model

    config = layout.config()
    dtype = DTYPES[layout.dtype]
    model = build_full_model(config.model, config.model.vocab_size, seed=config.run.seed, dtype=dtype).train()
    initial = {name: p.detach().float().clone() for name, p in model.named_parameters()}
    # Masters begin as the rounded weights, as those of a ZeRO optimizer do.
    masters = {name: p.detach().float().clone().requires_grad_() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in masters.values() if p.ndim > 1], "weight_decay": config.optim.weight_decay},
            {"params": [p for p in masters.values() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=layout.learning_rate,
        betas=(config.optim.beta1, config.optim.beta2),
        eps=config.optim.epsilon,
    )
    scale = 1024.0 if layout.dtype == "fp16" else 1.0
    losses, norms = [], []
    for step in range(STEPS):
        tokens, labels, mask, samples = batch(step, config.model)
        logits = model(tokens, Place(torch.arange(tokens.shape[1]), samples)).float()
        token_losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        loss = (token_losses * mask.flatten()).sum() / mask.sum()
        z_loss = layout.z_loss * (logits.logsumexp(-1).square() * mask).sum() / mask.sum()
        model.zero_grad()
        ((loss + z_loss) * scale).backward()
        for name, p in model.named_parameters():
            masters[name].grad = p.grad.float() / scale
        norms.append(float(torch.nn.utils.clip_grad_norm_(masters.values(), CLIP)))
        losses.append(float(loss.detach()))
        optimizer.step()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(masters[name])
    return Trace(losses, norms, initial, {name: p.detach().float() for name, p in model.named_parameters()})


def train_on_ranks(layouts: list[Layout]) -> list[Trace]:
    """Runs on every rank of one world: each layout in turn, through the engine that users train with."""
    return [_train(layout) for layout in layouts]


def _train(layout: Layout) -> Trace:
    import torch.distributed as dist

    from megalm.core.groups import ParallelContext
    from megalm.engine.deepspeed_engine import DeepSpeedEngine
    from megalm.models.gpt import build_gpt
    from megalm.topology import Topology

    config = layout.config()
    context = ParallelContext.create(
        Topology(tp=layout.tp, pp=layout.pp, cp=layout.cp, dp=layout.dp, virtual_stages=layout.v)
    )
    stage = build_gpt(config, config.model.vocab_size, context=context, dtype=DTYPES[layout.dtype])
    engine = DeepSpeedEngine(stage, context, config)
    initial = _put_in_full(engine)
    losses, norms = [], []
    for step in range(STEPS):
        result = engine.train_step(micro_batches(layout, step, context, stage.cp), layout.learning_rate)
        loss = torch.tensor([result.loss_sum], dtype=torch.float64)
        dist.all_reduce(loss)
        losses.append(float(loss.detach()))
        norms.append(result.grad_norm)
    return Trace(losses, norms, initial, _put_in_full(engine))


def micro_batches(layout: Layout, step: int, context, cp) -> list:
    """This rank's share of the global batch, cut into micro-batches of two samples."""
    from megalm.core.place import Place
    from megalm.models.gpt import MicroBatch

    tokens, labels, mask, samples = batch(step, layout.model)
    mine = slice(context.coordinates.dp, None, layout.dp)
    weight = mask * context.data.size / mask.sum()
    positions = torch.arange(tokens.shape[1])
    return [
        MicroBatch(t, x, w, Place(positions, s)).share_of(cp)
        for t, x, w, s in zip(
            tokens[mine].split(2), labels[mine].split(2), weight[mine].split(2), samples[mine].split(2), strict=True
        )
    ]


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


def at_dropout(model: Model, probability: float) -> Model:
    """A model with dropout everywhere."""
    return replace(model, dropout=probability, attention_dropout=probability)
