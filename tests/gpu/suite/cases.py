"""The table of cases; to add one, add a line: a name, and the fields in which it differs from the base.

A case is trained for six clipped steps by the engine on the device, and by plain PyTorch on the CPU in fp32. A run is
the same by the command line, with its loader, launcher and record.
"""

from __future__ import annotations

from dataclasses import dataclass

BASE = (
    "experiment=quickstart",
    "data.path=unused",
    "run.name=case",
    "run.seed=7",
    "parallel=single",
    "engine=fp32_zero1",
    "engine.bucket_mib=0.1",
    "engine.loss_chunk_tokens=1000",
    "engine.initial_loss_scale=1024",
    "optim.lr=1e-4",
    "optim.warmup_tokens=0",
    "optim.clip_grad_norm=0.2",
    "train.steps=6",
    "report.prompt=null",
)
"""Several buckets and chunks even for a small model, and clipping throughout."""

SIZES = {
    "cpu": (
        "model.num_layers=2",
        "model.hidden_size=32",
        "model.num_heads=2",
        "model.sequence_length=32",
        "model.vocab_size=61",
        "train.micro_batch_size=2",
        "train.global_batch_size=4",
    ),
    "cuda": (
        "model.num_layers=4",
        "model.hidden_size=256",
        "model.num_heads=4",
        "model.sequence_length=256",
        "model.vocab_size=1003",
        "train.micro_batch_size=4",
        "train.global_batch_size=16",
    ),
}
"""Heads of 64 and sequences of 256: what fused attention and flex attention take on GPUs."""


@dataclass(frozen=True)
class Bound:
    """How far a case may be from the CPU in fp32.

    Attributes:
        loss: absolute, in nats.
        grad_norm: relative.
    """

    loss: float
    grad_norm: float


FP32, HALF = Bound(1e-4, 1e-3), Bound(3e-2, 1e-1)
"""Sums in another order; and 16-bit weights, activations and products on top of it."""


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        name: in words.
        overrides: fields in which it differs from the base.
        bound: against the CPU.
        seconds: longest that it may take on a GPU; it is left out where less is left.
        compiles: whether it needs a compiler.
    """

    name: str
    overrides: tuple[str, ...] = ()
    bound: Bound = FP32
    seconds: float = 10.0
    compiles: bool = False


BF16, FP16 = ("engine.dtype=bf16", "optim.lr=1e-3"), ("engine.dtype=fp16", "optim.lr=1e-3")
COMPILED = ("engine.compile=true",)
LLAMA = (
    "model.position=rotary",
    "model.norm=rmsnorm",
    "model.activation=swiglu",
    "model.bias=false",
    "model.num_kv_heads=1",
    "model.tie_embeddings=false",
)
BERT = (
    "model.causal=false",
    "model.residual=post_norm",
    "model.token_types=2",
    "model.embedding_norm=true",
    "model.activation=gelu_erf",
    "model.head=masked_lm",
    "objective.name=mlm",
)
WINDOWS = ("model.attention_windows=[0,9]",)
FUSED = ("engine.attention=fused",)
DOCUMENTS = ("data.reset_at_documents=true",)

CASES = (
    Case("fp32"),
    Case("bf16", BF16, HALF),
    Case("fp16", FP16, HALF),
    Case("llama", LLAMA),
    Case("llama bf16", (*LLAMA, *BF16), HALF),
    Case("bert", BERT),
    Case("dropout", ("model.dropout=0.2",)),
    Case("attention dropout", ("model.attention_dropout=0.2",)),
    Case("z-loss", ("objective.z_loss=0.01",)),
    Case("documents", DOCUMENTS, seconds=40, compiles=True),
    Case("documents bf16", (*DOCUMENTS, *BF16), HALF, seconds=40, compiles=True),
    Case("windows", WINDOWS),
    Case("windows fused", (*WINDOWS, *FUSED), seconds=40, compiles=True),
    Case("windows fused bf16", (*WINDOWS, *FUSED, *BF16), HALF, seconds=40, compiles=True),
    Case("recompute selective", ("engine.recompute=selective",)),
    Case("recompute full", ("engine.recompute=full", "engine.recompute_every=2")),
    Case("offload", ("engine.offload_optimizer=true",)),
    Case("zero 0", ("engine.zero_stage=0",)),
    Case("zero 1", ("engine.zero_stage=1", "engine.recompute=none")),
    Case("zero 2", ("engine.zero_stage=2",)),
    Case("zero 3", ("engine.zero_stage=3",)),
    Case("zero 3 bf16", ("engine.zero_stage=3", *BF16), HALF),
    Case("zero bubble", ("parallel.schedule=zb_h1",)),
    Case("gradient accumulation fusion", ("engine.gradient_accumulation_fusion=true",)),
    Case("gradient accumulation fusion bf16", ("engine.gradient_accumulation_fusion=true", *BF16), HALF),
    Case("rows without padding", ("model.vocab_pad_multiple=1",)),
    Case("compiled", COMPILED, seconds=60, compiles=True),
    Case("compiled bf16", (*COMPILED, *BF16), HALF, seconds=60, compiles=True),
    Case("compiled llama", (*COMPILED, *LLAMA), seconds=60, compiles=True),
    Case("compiled, windows fused", (*COMPILED, *WINDOWS, *FUSED), seconds=60, compiles=True),
    Case("compiled, recompute full", (*COMPILED, "engine.recompute=full"), seconds=60, compiles=True),
)
"""On one device. Features that are opt-in on GPUs belong here too, each with the field that turns it on."""


@dataclass(frozen=True)
class Layout:
    """A layout of several ranks, by the command line.

    Attributes:
        name: in words.
        ranks: how many, one per device.
        overrides: fields in which it differs from one rank in fp32.
        bound: of losses, absolute; of gradient norms ten times that, relative.
    """

    name: str
    ranks: int
    overrides: tuple[str, ...]
    bound: float = 1e-3


LAYOUTS = (
    Layout("tp2", 2, ("parallel.tp=2",)),
    Layout("tp2, sequence parallel", 2, ("parallel.tp=2", "parallel.sequence_parallel=true")),
    Layout("tp2, overlap", 2, ("parallel.tp=2", "parallel.tp_overlap_parts=2")),
    Layout("pp2", 2, ("parallel.pp=2",)),
    Layout("pp2, early receives", 2, ("parallel.pp=2", "parallel.early_receives=true")),
    Layout("pp2, zero bubble", 2, ("parallel.pp=2", "parallel.schedule=zb_h1")),
    Layout("dp2", 2, ("launch.ranks=2",)),
    Layout("dp2, zero 2", 2, ("launch.ranks=2", "engine.zero_stage=2")),
    Layout("dp2, bf16 reduction", 2, ("launch.ranks=2", "engine.reduce_dtype=bf16"), 3e-3),
    Layout("dp2, late metrics", 2, ("launch.ranks=2", "train.late_metrics=true")),
    Layout("dp2, zero 3", 2, ("launch.ranks=2", "engine.zero_stage=3")),
    Layout("cp2, ulysses", 2, ("parallel.cp=2",)),
    Layout("cp2, ring", 2, ("parallel.cp=2", "parallel.cp_attention=ring")),
    Layout("cp2, ring fused", 2, ("parallel.cp=2", "parallel.cp_attention=ring", *FUSED, "engine=bf16_zero1"), 3e-2),
)
"""With as many devices; each is compared with one rank, step by step."""
