"""What this version of megalm runs: legal ranges, choices, and the combinations that a parity test proves.

Rules read these tables; to support something new, prove it in ``tests/dist`` and extend its table.
"""

from __future__ import annotations

from dataclasses import dataclass

LARGEST_INT = 2**31 - 1
LARGEST_INT64 = 2**63 - 1


@dataclass(frozen=True)
class Bounds:
    """An interval; ``low_open`` and ``high_open`` exclude its ends."""

    low: float
    high: float | None = None
    low_open: bool = False
    high_open: bool = False

    def contain(self, value: float) -> bool:
        """Whether the interval holds ``value``."""
        above = value > self.low if self.low_open else value >= self.low
        if self.high is None:
            return above
        return above and (value < self.high if self.high_open else value <= self.high)

    def __str__(self) -> str:
        low = f"above {self.low}" if self.low_open else f"at least {self.low}"
        if self.high is None:
            return low
        return f"{low} and {'below' if self.high_open else 'at most'} {self.high}"


_COUNT = Bounds(1, LARGEST_INT)
_COUNT_OR_ZERO = Bounds(0, LARGEST_INT)
_TOKENS = Bounds(1, LARGEST_INT64)
_POSITIVE = Bounds(0, low_open=True)
_UNIT = Bounds(0, 1)

BOUNDS: dict[str, Bounds] = {
    "run.seed": Bounds(0, LARGEST_INT64),
    "launch.ranks": _COUNT_OR_ZERO,
    "launch.threads_per_rank": _COUNT,
    "launch.timeout_seconds": _COUNT,
    "parallel.tp": _COUNT,
    "parallel.pp": _COUNT,
    "parallel.cp": _COUNT,
    "parallel.virtual_stages": _COUNT,
    "parallel.tp_overlap_parts": _COUNT,
    "parallel.stage_layers": _COUNT,
    "model.num_layers": _COUNT,
    "model.hidden_size": _COUNT,
    "model.num_heads": _COUNT,
    "model.head_dim": _COUNT,
    "model.num_kv_heads": _COUNT,
    "model.ffn_hidden_size": _COUNT,
    "model.vocab_size": Bounds(2, LARGEST_INT),
    "model.vocab_pad_multiple": Bounds(1, 8192),
    "model.sequence_length": _COUNT,
    "model.position_offset": _COUNT_OR_ZERO,
    "model.rotary_base": _POSITIVE,
    "model.rotary_fraction": Bounds(0, 1, low_open=True),
    "model.rotary_factor": Bounds(1),
    "model.rotary_original_length": _COUNT,
    "model.rotary_low_frequency_factor": _POSITIVE,
    "model.rotary_high_frequency_factor": _POSITIVE,
    "model.rotary_beta_fast": _POSITIVE,
    "model.rotary_beta_slow": _POSITIVE,
    "model.attention_windows": _COUNT_OR_ZERO,
    "model.token_types": _COUNT_OR_ZERO,
    "model.dropout": Bounds(0, 1, high_open=True),
    "model.attention_dropout": Bounds(0, 1, high_open=True),
    "model.norm_epsilon": _POSITIVE,
    "model.init_std": _POSITIVE,
    "data.weights": _POSITIVE,
    "data.max_epochs": Bounds(0),
    "data.phase": _COUNT_OR_ZERO,
    "data.cache_gib": _POSITIVE,
    "data.block_sequences": _COUNT,
    "data.lanes": _COUNT,
    "data.window_blocks": _COUNT,
    "data.prefetch_batches": _COUNT,
    "optim.lr": _POSITIVE,
    "optim.beta1": Bounds(0, 1, high_open=True),
    "optim.beta2": Bounds(0, 1, high_open=True),
    "optim.epsilon": _POSITIVE,
    "optim.weight_decay": Bounds(0),
    "optim.clip_grad_norm": Bounds(0),
    "optim.warmup_tokens": Bounds(0, LARGEST_INT64),
    "optim.decay_tokens": _TOKENS,
    "optim.cooldown_tokens": _TOKENS,
    "optim.min_lr_ratio": _UNIT,
    "optim.rewarm_tokens": _TOKENS,
    "objective.mask_probability": Bounds(0, 1, low_open=True),
    "objective.z_loss": Bounds(0),
    "engine.zero_stage": Bounds(0, 3),
    "engine.initial_loss_scale": Bounds(1),
    "engine.loss_scale_window": _COUNT,
    "engine.bucket_mib": _POSITIVE,
    "engine.recompute_every": _COUNT,
    "engine.loss_chunk_tokens": _COUNT_OR_ZERO,
    "checkpoint.every": _COUNT_OR_ZERO,
    "checkpoint.every_minutes": Bounds(0),
    "checkpoint.keep_last": _COUNT_OR_ZERO,
    "checkpoint.keep_every": _COUNT_OR_ZERO,
    "checkpoint.keep_best": _COUNT_OR_ZERO,
    "logging.every": _COUNT,
    "cluster.gpus": _COUNT_OR_ZERO,
    "cluster.gpus_per_node": _COUNT,
    "train.steps": _COUNT,
    "train.micro_batch_size": _COUNT,
    "train.global_batch_size": _COUNT,
    "train.batch_ramp_start": _COUNT,
    "train.batch_ramp_increment": _COUNT,
    "train.batch_ramp_tokens": Bounds(0, LARGEST_INT64),
    "train.validate_every": _COUNT_OR_ZERO,
    "train.validation_samples": _COUNT,
    "evaluate.every": _COUNT_OR_ZERO,
    "evaluate.examples": _COUNT_OR_ZERO,
    "evaluate.limit": _COUNT,
    "report.max_new_tokens": _COUNT,
    "report.temperature": Bounds(0),
    "report.top_k": _COUNT_OR_ZERO,
}
"""Legal values of every number in the schema; null, where the type allows it, is legal too."""

EVERY_RANK, ONE_PER_REPLICA = "every_rank", "one_per_replica"
"""Who reads the rows that several ranks compute with: ``data.readers``."""

CHOICES: dict[str, tuple[str, ...]] = {
    "launch.device": ("auto", "cpu", "cuda"),
    "checkpoint.on_failure": ("continue", "stop"),
    "parallel.schedule": ("1f1b", "gpipe", "interleaved_1f1b", "zb_h1"),
    "parallel.cp_attention": ("ulysses", "ring"),
    "data.readers": (EVERY_RANK, ONE_PER_REPLICA),
    "model.position": ("learned", "rotary"),
    "model.rotary_scaling": ("none", "linear", "llama3", "yarn"),
    "model.residual": ("pre_norm", "post_norm", "parallel"),
    "model.norm": ("layernorm", "rmsnorm"),
    "model.activation": ("gelu", "gelu_erf", "swiglu"),
    "model.head": ("linear", "masked_lm"),
    "objective.name": ("clm", "mlm", "sft"),
    "optim.schedule": ("cosine", "linear", "constant", "wsd"),
    "optim.cooldown": ("linear", "sqrt"),
    "engine.dtype": ("bf16", "fp16", "fp32"),
    "engine.reduce_dtype": ("fp32", "bf16"),
    "engine.recompute": ("none", "selective", "full"),
    "engine.attention": ("auto", "fused"),
    "logging.wandb": ("auto", "online", "offline", "disabled"),
}
"""Legal values of every field that names an alternative."""

PROVEN: dict[str, tuple[int, ...]] = {
    "bf16": (1, 2, 3),
    "fp16": (1, 2),
    "fp32": (0, 1, 2, 3),
}
"""Number format ▶ ZeRO stages whose losses and clipped gradient norms a test compares with one process. Every other
combination is refused: with 16-bit weights stage 0 keeps no fp32 masters apart from them."""
