"""Faults that ``megalm verify`` must find, for the ranks that a test starts."""

from __future__ import annotations

from megalm.core.mlp import GeluMLP
from megalm.verify.parity import Trace, train_on_layout
from megalm.verify.shrink import Case


def train_case(case: Case) -> Trace:
    """A layer that is off by a thousandth under tensor parallelism; replicas that cannot start."""
    if case.dp > 1:
        raise RuntimeError("this replica is lost")
    if case.topology.tp == 1:
        return train_on_layout(case.config, case.topology)
    forward = GeluMLP.forward
    GeluMLP.forward = lambda self, x: forward(self, x) * 1.001
    try:
        return train_on_layout(case.config, case.topology)
    finally:
        GeluMLP.forward = forward
