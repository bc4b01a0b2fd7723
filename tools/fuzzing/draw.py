"""Random configs that the rules accept: a pure function of a seed."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megalm.config.check import RULES
from megalm.config.job import Job
from megalm.config.parse import config_from_dict
from megalm.config.schema import Config

STEPS, SAVE_EVERY = 6, 2
LENGTHS = (16, 24, 32, 48)
CHUNK_TOKENS = 192
"""Tokens per chunk of the datasets; every length divides it."""
_MOST_TRIES = 100

Fields = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One run, cut in two, and what it is held against.

    Attributes:
        seed: what it was drawn from.
        base: fields that all three runs share: model, data, objective, optimizer, number format, batch.
        first: layout and engine until the cut.
        second: the same afterwards.
        cut: step after which the run ends for the first time.
        killed: whether it ends there without saving; else it is asked to stop.
    """

    seed: int
    base: Fields
    first: Fields
    second: Fields
    cut: int
    killed: bool

    @property
    def reference(self) -> Fields:
        """The same run on one rank, each step in one micro-batch where no ramp changes the batch."""
        micro = self.base["train.batch_ramp_start"] or self.base["train.global_batch_size"]
        return {"launch.ranks": 1, "engine.zero_stage": 1, "train.micro_batch_size": micro}


def draw(seed: int, datasets: Mapping[str, str], most_ranks: int) -> Case:
    """A case whose three runs the rules accept.

    Args:
        seed: decides everything.
        datasets: path of each kind: ``plain`` and ``masked``.
        most_ranks: of a run.
    """
    rng = random.Random(seed)
    for _ in range(_MOST_TRIES):
        base = _base(rng, datasets)
        layouts = [layout for layout in (_accepted_layout(rng, base, most_ranks) for _ in range(2)) if layout]
        if len(layouts) == 2:
            case = Case(seed, base, *layouts, rng.randint(1, STEPS - 1), killed=rng.random() < 0.5)
            if is_accepted({**base, **case.reference}):
                return case
    raise AssertionError(f"seed {seed}: {_MOST_TRIES} models were drawn, and the rules accept none of them")


def _accepted_layout(rng: random.Random, base: Fields, most_ranks: int) -> Fields | None:
    """A layout that fits; None: none of many that were drawn does."""
    for _ in range(_MOST_TRIES):
        layout = _layout(rng, base, most_ranks)
        if is_accepted({**base, **layout}):
            return layout
    return None


def is_accepted(fields: Fields) -> bool:
    """Whether no rule speaks against a config on the ranks that it names."""
    job = Job(config_of(fields), fields["launch.ranks"])
    return not any(True for rule in RULES for _ in rule(job))


def config_of(fields: Fields) -> Config:
    """Dotted fields as a config."""
    nested: dict[str, dict[str, Any]] = {"run": {"name": "fuzz"}}
    for path, value in fields.items():
        section, name = path.split(".")
        nested.setdefault(section, {})[name] = value
    return config_from_dict(nested)


def overrides_of(fields: Fields) -> list[str]:
    """Dotted fields as a command line spells them."""
    return [f"{path}={_spelled(value)}" for path, value in fields.items()]


def _base(rng: random.Random, datasets: Mapping[str, str]) -> Fields:
    dtype = rng.choice(("fp32", "fp32", "fp32", "bf16", "fp16"))
    batch = rng.choice((4, 6, 8, 12))
    ramp = rng.choice((None, None, None, batch // 2))
    return {
        **_model(rng),
        "data.path": [datasets[rng.choice(("plain", "plain", "masked"))]],
        "data.reset_at_documents": rng.random() < 0.2,
        "run.seed": rng.randint(0, 99),
        "optim.lr": 1e-4 if dtype == "fp32" else 1e-3,
        "optim.clip_grad_norm": rng.choice((0.0, 0.05, 0.3, 1.0)),
        "optim.schedule": rng.choice(("cosine", "linear", "constant", "wsd")),
        "optim.warmup_tokens": rng.choice((0, 200)),
        "optim.weight_decay": rng.choice((0.0, 0.1)),
        "objective.z_loss": rng.choice((0.0, 0.0, 1e-2)),
        "engine.dtype": dtype,
        "engine.initial_loss_scale": 256.0,
        "train.steps": STEPS,
        "train.global_batch_size": batch,
        "train.batch_ramp_start": ramp,
        "train.batch_ramp_tokens": 2 * batch * 16 if ramp else 0,
        "train.validate_every": rng.choice((0, 2)),
        "train.validation_samples": rng.choice((3, 8)),
        "checkpoint.every": SAVE_EVERY,
        "checkpoint.keep_last": 0,
        "checkpoint.asynchronous": rng.random() < 0.5,
        "logging.wandb": "disabled",
        "logging.tensorboard": False,
        "report.plot": False,
        "report.prompt": None,
    }


def _model(rng: random.Random) -> Fields:
    heads, width = rng.choice((2, 4, 8)), rng.choice((4, 8, 12))
    causal = rng.random() < 0.75
    rotary = rng.random() < 0.5
    scaling = rng.choice(("none", "none", "linear", "llama3", "yarn")) if rotary else "none"
    dropout = rng.choice((0.0, 0.0, 0.1))
    return {
        "model.num_layers": rng.randint(1, 5),
        "model.hidden_size": heads * width,
        "model.num_heads": heads,
        "model.head_dim": rng.choice((None, None, None, 4, 12)),
        "model.num_kv_heads": rng.choice((None, None, 1, 2, heads)),
        "model.ffn_hidden_size": rng.choice((None, heads * 6, 32)),
        "model.sequence_length": rng.choice(LENGTHS),
        "model.causal": causal,
        "objective.name": "clm" if causal else "mlm",
        "objective.whole_words": not causal and rng.random() < 0.5,
        "model.position": "rotary" if rotary else "learned",
        "model.position_offset": 0 if rotary else rng.choice((0, 0, 2)),
        "model.rotary_fraction": rng.choice((1.0, 0.5)) if rotary else 1.0,
        "model.rotary_scaling": scaling,
        "model.rotary_factor": 1.0 if scaling == "none" else 4.0,
        "model.attention_windows": rng.choice(([0], [0], [0, 5], [7])),
        "model.qk_norm": rng.random() < 0.25,
        "model.residual": rng.choice(("pre_norm", "pre_norm", "post_norm", "parallel")),
        "model.token_types": rng.choice((0, 0, 2)),
        "model.embedding_norm": rng.random() < 0.25,
        "model.dropout": dropout,
        "model.attention_dropout": rng.choice((0.0, dropout)),
        "model.norm": rng.choice(("layernorm", "rmsnorm")),
        "model.activation": rng.choice(("gelu", "gelu_erf", "swiglu")),
        "model.bias": rng.random() < 0.6,
        "model.qkv_bias": rng.choice((None, True)),
        "model.projection_bias": rng.choice((None, None, True, False)),
        "model.norm_bias": rng.choice((None, None, True, False)),
        "model.tie_embeddings": rng.random() < 0.6,
        "model.head": "linear" if causal else rng.choice(("linear", "masked_lm")),
    }


def _layout(rng: random.Random, base: Fields, most_ranks: int) -> Fields:
    degrees = [rng.choice((1, 1, 2, 4)), rng.choice((1, 1, 2, 4)), rng.choice((1, 1, 1, 2))]
    tp, pp, cp = degrees
    replicas = rng.choice((1, 2, 2, 3, 4))
    while tp * pp * cp * replicas > most_ranks:
        replicas, tp, pp, cp = rng.choice(((1, tp, pp, cp), (1, 1, pp, cp), (replicas, tp, 1, 1), (1, tp, pp, 1)))
    stages = rng.choice((1, 1, 2)) if pp > 1 else 1
    schedules = ("interleaved_1f1b",) if stages > 1 else ("1f1b", "gpipe", "zb_h1")
    return {
        "launch.ranks": tp * pp * cp * replicas,
        "parallel.tp": tp,
        "parallel.pp": pp,
        "parallel.cp": cp,
        "parallel.virtual_stages": stages,
        "parallel.schedule": rng.choice(schedules),
        "parallel.stage_layers": _split(rng, base["model.num_layers"], pp * stages) if rng.random() < 0.3 else None,
        "parallel.sequence_parallel": tp > 1 and rng.random() < 0.5,
        "parallel.tp_overlap_parts": rng.choice((1, 2, 3)) if tp > 1 else 1,
        "parallel.cp_attention": rng.choice(("ulysses", "ring")),
        "engine.zero_stage": rng.choice((0, 1, 2, 3) if pp == 1 else (0, 1)),
        "engine.offload_optimizer": rng.random() < 0.15,
        "engine.bucket_mib": rng.choice((0.01, 32.0)),
        "engine.recompute": rng.choice(("none", "none", "selective", "full")),
        "engine.recompute_every": rng.choice((1, 2)),
        "engine.loss_chunk_tokens": rng.choice((0, 12, 2048)),
        "train.micro_batch_size": rng.choice((1, 2, 3)),
        "data.prefetch_batches": rng.choice((1, 2)),
        "engine.gradient_accumulation_fusion": rng.random() < 0.2,
        "data.readers": rng.choice(("every_rank", "one_per_replica")),
        "train.late_metrics": rng.choice((False, True)),
    }


def _split(rng: random.Random, layers: int, stages: int) -> list[int] | None:
    """A random split of layers over stages; None where there are too few."""
    if layers < stages:
        return None
    cuts = sorted(rng.sample(range(1, layers), stages - 1))
    return [stop - start for start, stop in zip([0, *cuts], [*cuts, layers], strict=True)]


def _spelled(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_spelled, value))}]"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
