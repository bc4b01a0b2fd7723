"""Layers ▶ stages, balanced by cost: the embedding and the output projection count too.

All costs are in units of one Transformer block. The split is the contiguous one with the smallest largest stage, found
exactly, so a head as heavy as two blocks simply leaves the last stage with two blocks fewer.
"""

from __future__ import annotations

from functools import cache


def partition_layers(
    num_layers: int,
    num_stages: int,
    *,
    embedding_cost: float = 0.0,
    head_cost: float = 0.0,
    sizes: tuple[int, ...] | None = None,
) -> list[range]:
    """The layers of each stage: ``num_stages`` contiguous, non-empty ranges that together are every layer once.

    Args:
        num_layers: Transformer blocks.
        num_stages: pipeline stages, virtual ones included.
        embedding_cost: what the first stage does besides its blocks.
        head_cost: what the last stage does besides its blocks.
        sizes: layers of each stage, where the split is given instead of found.

    Raises:
        ValueError: fewer layers than stages; or ``sizes`` are not one per stage, at least 1, adding up to all layers.
    """
    if num_layers < num_stages:
        raise ValueError(f"{num_layers} layers cannot fill {num_stages} stages")

    if sizes is not None:
        if len(sizes) != num_stages or sum(sizes) != num_layers or min(sizes) < 1:
            raise ValueError(f"stages of {sizes} layers are no split of {num_layers} layers into {num_stages} stages")
        return _ranges(sizes)

    def cost(stage: int, layers: int) -> float:
        return layers + embedding_cost * (stage == 0) + head_cost * (stage == num_stages - 1)

    @cache
    def best(stage: int, remaining: int) -> tuple[float, float, tuple[int, ...]]:
        """(largest stage, sum of squares as tie-break, sizes) of the stages from ``stage`` on."""
        if stage == num_stages - 1:
            last = cost(stage, remaining)
            return last, last * last, (remaining,)
        options = []
        for layers in range(1, remaining - (num_stages - stage - 1) + 1):
            here = cost(stage, layers)
            largest, squares, sizes = best(stage + 1, remaining - layers)
            options.append((max(here, largest), squares + here * here, (layers, *sizes)))
        return min(options)

    return _ranges(best(0, num_layers)[2])


def _ranges(sizes: tuple[int, ...]) -> list[range]:
    ranges, start = [], 0
    for size in sizes:
        ranges.append(range(start, start + size))
        start += size
    return ranges
