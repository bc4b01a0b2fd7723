"""AdamW and its parameter groups."""

from __future__ import annotations

import torch

from megalm.config.schema import Optim
from megalm.core.sharding import DeclaredParameter


def make_adamw(parameters: list[DeclaredParameter], optim: Optim) -> torch.optim.AdamW:
    """Fused AdamW (Loshchilov & Hutter 2019) with two groups: matrices decay, norms and biases do not."""
    groups = [
        {"params": [p.parameter for p in parameters if p.declaration.decays], "weight_decay": optim.weight_decay},
        {"params": [p.parameter for p in parameters if not p.declaration.decays], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.epsilon,
        fused=True,
    )
