"""A hypothesis strategy of configs with known faults, for every test that feeds bad configs to something."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

# Valid as a whole; faults are injected into it.
SOUND: dict[str, Any] = {
    "run.name": "sound",
    "launch.ranks": 8,
    "parallel.tp": 2,
    "parallel.pp": 2,
    "model.num_layers": 4,
    "model.hidden_size": 64,
    "model.num_heads": 4,
    "model.vocab_size": 100,
    "model.sequence_length": 32,
    "data.path": ("data/none",),
    "optim.lr": 1e-3,
    "train.steps": 10,
    "train.micro_batch_size": 2,
    "train.global_batch_size": 8,
}


@dataclass(frozen=True)
class Fault:
    """One thing made wrong.

    Attributes:
        changes: dotted field ▶ value.
        named: fields of which at least one must head a line of the report.
        relies_on: fields that other faults must leave alone for this to be a fault.
    """

    changes: tuple[tuple[str, Any], ...]
    named: tuple[str, ...]
    relies_on: frozenset[str] = frozenset()

    @property
    def touches(self) -> frozenset[str]:
        """Every field that matters to the fault."""
        return self.relies_on | {path for path, _ in self.changes}


def _single(path: str, *values: Any) -> st.SearchStrategy[Fault]:
    return st.sampled_from(values).map(lambda value: Fault(((path, value),), (path,)))


def _relation(path: str, values: st.SearchStrategy[Any], *relies_on: str, named: str = "") -> st.SearchStrategy[Fault]:
    return values.map(lambda value: Fault(((path, value),), (named or path,), frozenset(relies_on)))


_COUNTS = [
    "parallel.tp",
    "parallel.pp",
    "parallel.cp",
    "parallel.virtual_stages",
    "model.num_layers",
    "model.hidden_size",
    "model.num_heads",
    "model.num_kv_heads",
    "model.ffn_hidden_size",
    "model.sequence_length",
    "train.steps",
    "train.micro_batch_size",
    "train.global_batch_size",
    "train.validation_samples",
    "launch.threads_per_rank",
    "launch.timeout_seconds",
    "data.lanes",
    "data.block_sequences",
    "data.window_blocks",
    "data.prefetch_batches",
    "cluster.gpus_per_node",
    "logging.every",
    "optim.decay_tokens",
    "optim.cooldown_tokens",
    "train.batch_ramp_start",
    "train.batch_ramp_increment",
]
_TOKEN_COUNTS = ("optim.decay_tokens", "optim.cooldown_tokens")
_NOT_NEGATIVE = [
    "optim.weight_decay",
    "optim.clip_grad_norm",
    "optim.warmup_tokens",
    "train.batch_ramp_tokens",
    "checkpoint.every",
    "checkpoint.keep_last",
]
_POSITIVE = ["optim.lr", "optim.epsilon", "model.init_std", "model.norm_epsilon", "model.rotary_base"]
_CHOICES = [
    "launch.device",
    "parallel.schedule",
    "model.position",
    "model.norm",
    "model.activation",
    "objective.name",
    "optim.schedule",
    "optim.cooldown",
    "engine.dtype",
    "logging.wandb",
]

_RAMP_RELIES_ON = frozenset(
    {
        "train.batch_ramp_start",
        "train.batch_ramp_increment",
        "train.batch_ramp_tokens",
        "train.global_batch_size",
        "train.micro_batch_size",
        "train.steps",
        "model.sequence_length",
        "launch.ranks",
        "parallel.tp",
        "parallel.pp",
        "parallel.cp",
    }
)

FAULTS: tuple[st.SearchStrategy[Fault], ...] = (
    *(_single(path, 0, -1, -7, -2 if path in _TOKEN_COUNTS else 2**40) for path in _COUNTS),
    *(_single(path, -1, -100) for path in _NOT_NEGATIVE),
    *(_single(path, 0, -0.5) for path in _POSITIVE),
    *(_single(path, "nonsense", "", "BF-16", "fp8") for path in _CHOICES),
    _relation("parallel.cp", st.sampled_from([4, 8]), "parallel.tp", "model.num_heads", "parallel.cp_attention"),
    _relation("parallel.virtual_stages", st.just(2), "parallel.pp", "parallel.schedule", "model.num_layers"),
    _relation("parallel.schedule", st.just("interleaved_1f1b"), "parallel.pp", "parallel.virtual_stages"),
    _relation(
        "parallel.stage_layers",
        st.sampled_from([(4,), (1, 2), (2, 2, 1), (0, 4)]),
        "parallel.pp",
        "parallel.virtual_stages",
        "model.num_layers",
    ),
    st.just(
        Fault(
            (("parallel.sequence_parallel", True), ("model.sequence_length", 33)),
            ("model.sequence_length",),
            frozenset({"parallel.tp", "parallel.cp"}),
        )
    ),
    st.just(Fault((("model.rotary_factor", 4.0),), ("model.rotary_factor",), frozenset({"model.rotary_scaling"}))),
    st.just(Fault((("model.rotary_scaling", "yarn"),), ("model.rotary_scaling",), frozenset({"model.position"}))),
    st.just(
        Fault(
            (("model.position", "rotary"), ("model.rotary_fraction", 0.1)),
            ("model.rotary_fraction",),
            frozenset({"model.hidden_size", "model.num_heads"}),
        )
    ),
    _single("run.name", "", "a/b", "..", "two ", "../up", "x" * 300),
    _single("run.seed", -1, 2**63),
    _single("run.dir", "", "  "),
    _single("data.path", ("",), ("data/none", "\t"), ("pipe:cat index.json",)),
    _single("logging.wandb_project", "", "team/p"),
    _single("evaluate.tasks", ("arithmatic",), ("none.yaml",), ("qa", "qa")),
    _single("evaluate.data", ("a.jsonl", "b.jsonl"), ("",)),
    _single("evaluate.limit", 0, -3),
    _single("evaluate.every", -1),
    _single("evaluate.examples", -1),
    _single("logging.wandb_tags", ("a", "a"), ("x" * 65,), ("",)),
    _single("checkpoint.every_minutes", -1.0),
    _single("optim.beta1", 1, 1.5, -0.1),
    _single("optim.beta2", 1, 2, -1),
    _single("optim.min_lr_ratio", -0.1, 1.1),
    _single("model.vocab_size", 1, 0, -5),
    _single("engine.zero_stage", -1, 4, 17),
    _relation("engine.zero_stage", st.sampled_from([2, 3]), "parallel.pp", "engine.dtype"),
    _relation("engine.zero_stage", st.just(0), "parallel.pp", "engine.dtype"),
    _relation("data.weights", st.sampled_from([(0.5, 0.5), (-1.0,), (0.0,)]), "data.path"),
    _relation("data.max_epochs", st.sampled_from([(1.0, 2.0), (-1.0,)]), "data.path"),
    _single("data.phase", -1, -7),
    _single("data.cache_gib", 0, -1.5),
    _single("objective.mask_probability", 0, -0.1, 1.5),
    _relation("objective.name", st.just("mlm"), "model.causal", named="model.causal"),
    _relation("model.causal", st.just(False), "objective.name"),
    _relation("model.num_heads", st.sampled_from([3, 5, 6, 7, 63]), "model.hidden_size"),
    _relation("model.num_kv_heads", st.sampled_from([3, 8]), "model.num_heads"),
    _relation(
        "model.ffn_hidden_size", st.sampled_from([7, 255]), "parallel.tp", "model.num_heads", named="parallel.tp"
    ),
    _relation("model.num_layers", st.just(1), "parallel.pp", "parallel.virtual_stages", "parallel.tp", "parallel.cp"),
    _relation("parallel.tp", st.sampled_from([3, 5, 8]), "model.num_heads", "model.num_kv_heads"),
    _relation("launch.ranks", st.integers(1, 400).filter(lambda n: n % 4), "parallel.tp", "parallel.pp", "parallel.cp"),
    _relation(
        "train.global_batch_size",
        st.integers(1, 500).filter(lambda n: n % 4),
        "train.micro_batch_size",
        "launch.ranks",
        "parallel.tp",
        "parallel.pp",
        "parallel.cp",
    ),
    st.just(
        Fault((("optim.warmup_tokens", 100), ("optim.decay_tokens", 100)), ("optim.warmup_tokens",)),
    ),
    st.sampled_from([("optim.schedule", "wsd"), ("optim.min_lr_ratio", 0.0)]).map(
        lambda schedule: Fault(
            (
                schedule,
                ("optim.cooldown_tokens", 90),
                ("optim.warmup_tokens", 20),
                ("optim.decay_tokens", 100),
            ),
            ("optim.cooldown_tokens",),
            frozenset({"optim.schedule"}),
        )
    ),
    st.just(Fault((("optim.cooldown", "sqrt"),), ("optim.cooldown",), frozenset({"optim.schedule"}))),
    *(
        st.just(Fault(changes, (named,), _RAMP_RELIES_ON))
        for changes, named in (
            ((("train.batch_ramp_start", 4),), "train.batch_ramp_tokens"),
            ((("train.batch_ramp_tokens", 500),), "train.batch_ramp_tokens"),
            ((("train.batch_ramp_increment", 4),), "train.batch_ramp_increment"),
            ((("train.batch_ramp_start", 2), ("train.batch_ramp_tokens", 64)), "train.batch_ramp_start"),
            ((("train.batch_ramp_start", 12), ("train.batch_ramp_tokens", 64)), "train.batch_ramp_start"),
            (
                (("train.batch_ramp_start", 4), ("train.batch_ramp_tokens", 64), ("train.batch_ramp_increment", 3)),
                "train.batch_ramp_increment",
            ),
            (
                (
                    ("train.global_batch_size", 24),
                    ("train.batch_ramp_start", 8),
                    ("train.batch_ramp_tokens", 64),
                    ("train.batch_ramp_increment", 12),
                ),
                "train.batch_ramp_increment",
            ),
        )
    ),
    st.just(
        Fault((("checkpoint.init_from", "runs/a"), ("checkpoint.resume", "runs/b")), ("checkpoint.init_from",)),
    ),
    st.just(
        Fault(
            (("model.position", "rotary"), ("model.hidden_size", 60)),
            ("model.num_heads",),
            frozenset({"model.num_heads"}),
        )
    ),
)


@dataclass(frozen=True)
class InvalidConfig:
    """A config with faults, as dotted fields, and the faults."""

    values: dict[str, Any]
    faults: tuple[Fault, ...]

    @property
    def overrides(self) -> list[str]:
        """The config as command-line overrides; text is quoted for Hydra's grammar."""
        return overrides_of(self.values)

    @property
    def mapping(self) -> dict[str, dict[str, Any]]:
        """The config as nested mappings."""
        return nested(self.values)


def overrides_of(values: dict[str, Any]) -> list[str]:
    """Dotted fields as command-line overrides."""
    return [f"{path}={_spell(value)}" for path, value in values.items()]


def nested(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Dotted fields ▶ nested mappings."""
    mapping: dict[str, dict[str, Any]] = {}
    for path, value in values.items():
        section, name = path.split(".")
        mapping.setdefault(section, {})[name] = value
    return mapping


@st.composite
def random_invalid(draw: st.DrawFn, most_faults: int = 4) -> InvalidConfig:
    """A config with one to ``most_faults`` faults, none of which hides another."""
    faults: list[Fault] = []
    for strategy in draw(st.lists(st.sampled_from(FAULTS), min_size=1, max_size=most_faults)):
        fault = draw(strategy)
        if all(fault.touches.isdisjoint(other.touches) for other in faults):
            faults.append(fault)
    values = dict(SOUND)
    for fault in faults:
        values.update(fault.changes)
    return InvalidConfig(values, tuple(faults))


def _spell(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{','.join(map(_spell, value))}]"
    return "'" + value + "'" if isinstance(value, str) else str(value)
