"""Attention over a split sequence against attention over the whole one: output and the gradients of all inputs."""

from __future__ import annotations

import itertools

import torch
from harness import run_ranks

S, B, D = 32, 2, 8


def check_on_ranks(degree: int) -> list[str]:
    """Runs on every rank; returns what differs."""
    import torch.distributed as dist

    from megalm.core.attention import flash
    from megalm.core.attention.attend import AttentionCore
    from megalm.core.attention.context_parallel import ContextParallel
    from megalm.core.place import Place
    from megalm.mesh.groups import Group

    rank = dist.get_rank()
    members = tuple(range(rank // degree * degree, (rank // degree + 1) * degree))
    handle = dist.new_group(list(members), use_local_synchronization=True)
    wrong = []
    kernel, calls = {name: getattr(flash, name) for name in ("forward", "backward")}, []

    def counted(name, function):
        return lambda *a, **k: (calls.append(name), function(*a, **k))[1]

    for name, function in kernel.items():
        setattr(flash, name, counted(name, function))
    for (method, fused), kv_heads, window, dropout, causal in itertools.product(
        (("ulysses", False), ("ring", False), ("ring", True)), (1, 2, 4), (0, 5), (0.0, 0.3), (True, False)
    ):
        cp = ContextParallel(Group(members, members.index(rank), handle), method)
        core = AttentionCore(causal=causal, window=window, dropout=dropout, seed=1, layer=0, fused=fused)
        calls.clear()
        generator = torch.Generator().manual_seed(0)
        query = torch.randn(B, 4, S, D, generator=generator, dtype=torch.float64)
        key, value = torch.randn(2, B, kv_heads, S, D, generator=generator, dtype=torch.float64).unbind()
        upstream = torch.randn(B, 4, S, D, generator=generator, dtype=torch.float64)
        samples, heads = torch.tensor([3, 5]), torch.arange(4)

        whole = [t.clone().requires_grad_() for t in (query, key, value)]
        want = core(*whole, heads, samples)
        want.backward(upstream)

        mine = cp.positions(S)
        parts = [t[:, :, mine].clone().requires_grad_() for t in (query, key, value)]
        got = cp.attend(core, *parts, heads, Place(mine, samples))
        got.backward(upstream[:, :, mine])
        by_kernel = fused and not window and not dropout
        # Of the 2C chunks of keys each of a rank's two chunks sees those before it and its own; or all.
        tiles = (2 * degree + 1 if causal else 4 * degree) if by_kernel else 0
        if (calls.count("forward"), calls.count("backward")) != (tiles, tiles):
            wrong.append(f"{method} fused={fused} window={window} dropout={dropout}: {len(calls)} calls of the kernel")
        # Dropout's probabilities are fp32, and so is what the ring assembles of half-precision inputs.
        tolerance = 1e-5
        for name, ours, theirs in [
            ("output", got, want[:, :, mine]),
            *((n, p.grad, w.grad[:, :, mine]) for n, p, w in zip("qkv", parts, whole, strict=True)),
        ]:
            worst = float((ours - theirs).abs().max())
            if not worst < tolerance:
                settings = f"K={kv_heads} window={window} dropout={dropout} causal={causal}"
                wrong.append(f"{method} fused={fused} {settings}: {name} {worst}")
    for name, function in kernel.items():
        setattr(flash, name, function)
    held = torch.zeros(S)
    held[ContextParallel(Group(members, members.index(rank), handle), "ring").positions(S)] = 1.0
    dist.all_reduce(held, group=handle)
    if not bool((held == 1.0).all()):
        wrong.append("the ring's chunks are not each token once")
    return wrong


def check_both_degrees() -> list[str]:
    return check_on_ranks(2) + check_on_ranks(4)


def test_split_attention_equals_whole_attention() -> None:
    for wrong in run_ranks(4, check_both_degrees):
        assert wrong == []
