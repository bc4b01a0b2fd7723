"""Layouts for the proof of parity, which is ``megalm.verify.parity``: tests and ``megalm verify`` share it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

from megalm.config.schema import Config, Data, Engine, Model, Objective, Optim, Parallel, Run, Train
from megalm.mesh.groups import ParallelContext
from megalm.mesh.topology import Topology
from megalm.verify.parity import Task, Trace, build_engine, train

STEPS = 6
MICRO_BATCH = 2
CLIP = 0.2
"""Below every gradient norm of these six steps: clipping is active throughout."""

MODEL = Model(num_layers=2, hidden_size=32, num_heads=4, sequence_length=16, vocab_size=61)
"""A vocabulary that neither 2 nor 4 divides, so that the last rank's rows are padded."""


@dataclass(frozen=True)
class Layout:
    """Degrees, schedule, engine and model of one case."""

    tp: int = 1
    sp: bool = False
    parts: int = 1
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
    transport: str = "gloo"
    reduce_dtype: str = "fp32"
    fusion: bool = False
    recompute: str = "none"
    recompute_every: int = 1
    compile: bool = False
    z_loss: float = 0.0
    reset_at_documents: bool = False
    batch: int | None = None
    """Sequences of a step; None: those of :attr:`global_batch`."""
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
            if item.name
            in (
                "parts",
                "v",
                "stage_layers",
                "offload",
                "transport",
                "reduce_dtype",
                "fusion",
                "recompute",
                "recompute_every",
                "compile",
                "z_loss",
                "reset_at_documents",
            )
            and getattr(self, item.name) != getattr(default, item.name)
        ]
        if self.cp > 1:
            parts.append(f"cp{self.cp}-{self.cp_attention}")
        return "·".join([*parts, self.name] if self.name else parts)

    @property
    def topology(self) -> Topology:
        return Topology(tp=self.tp, pp=self.pp, cp=self.cp, dp=self.dp, virtual_stages=self.v)

    @property
    def whole_model(self) -> Model:
        """With a layer at least for each stage."""
        layers = sum(self.stage_layers) if self.stage_layers else self.pp * self.v
        return replace(self.model, num_layers=max(self.model.num_layers, layers))

    @property
    def global_batch(self) -> int:
        """Two micro-batches of each replica on each stage: gradients add up, and each stage has some under way."""
        return self.batch or MICRO_BATCH * 2 * self.pp * self.dp

    @property
    def learning_rate(self) -> float:
        """At 1e-3 Adam turns the rounding of fp32 gradients into steps of 2e-5; 16-bit weights need 1e-3 to move."""
        return 1e-4 if self.dtype == "fp32" else 1e-3

    @property
    def reference(self) -> Layout:
        """The same computation in one process; layouts that share it share a reference run."""
        return Layout(
            dtype=self.dtype,
            z_loss=self.z_loss,
            reset_at_documents=self.reset_at_documents,
            model=self.whole_model,
            batch=self.global_batch,
        )

    def config(self) -> Config:
        return Config(
            run=Run(name="parity", seed=7),
            model=self.whole_model,
            data=Data(path=("unused",), reset_at_documents=self.reset_at_documents),
            objective=Objective(z_loss=self.z_loss),
            optim=Optim(lr=self.learning_rate, clip_grad_norm=CLIP),
            train=Train(steps=STEPS, micro_batch_size=MICRO_BATCH, global_batch_size=self.global_batch),
            parallel=Parallel(
                tp=self.tp,
                pp=self.pp,
                cp=self.cp,
                virtual_stages=self.v,
                schedule=self.schedule,
                stage_layers=self.stage_layers,
                sequence_parallel=self.sp,
                tp_overlap_parts=self.parts,
                cp_attention=self.cp_attention,
            ),
            engine=Engine(
                dtype=self.dtype,
                zero_stage=self.zero_stage,
                offload_optimizer=self.offload,
                reduce_dtype=self.reduce_dtype,
                gradient_accumulation_fusion=self.fusion,
                recompute=self.recompute,
                recompute_every=self.recompute_every,
                compile=self.compile,
                bucket_mib=0.02,  # several buckets even for a model this small
                loss_chunk_tokens=12,  # several chunks, the last one shorter
                initial_loss_scale=1024.0,
            ),
        )


def train_on_ranks(layout: Layout) -> Trace:
    """On gloo, whose rules for communication the layout names another transport's or gloo's own."""
    config = layout.config()
    task = Task.of(config)
    context = replace(ParallelContext.create(layout.topology), transport=layout.transport)
    return train(build_engine(config, context, task), config, task)


def at_dropout(model: Model, probability: float) -> Model:
    """A model with dropout everywhere."""
    return replace(model, dropout=probability, attention_dropout=probability)
