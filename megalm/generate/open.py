"""Opens a trained model to be asked, on as many ranks as its layout has. torch is imported where the model is held."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from megalm.generate.asked import BATCH_SIZE, AskedModel
from megalm.runs.find import FoundModel


@contextmanager
def opened(found: FoundModel, overrides: Sequence[str] = (), *, batch_size: int = BATCH_SIZE) -> Iterator[AskedModel]:
    """A model in this process, or on ranks that are started for it and end with the block.

    Args:
        found: the model and its layout.
        overrides: with which it was found.
        batch_size: rows that a replica computes together.

    Raises:
        CheckpointError: the checkpoint does not fit the config, or is damaged.
    """
    ranks = start(found, overrides)
    try:
        yield AskedModel(found, ranks, batch_size=batch_size)
    finally:
        ranks.close()


def start(found: FoundModel, overrides: Sequence[str] = ()) -> Any:
    """The ranks of :func:`opened`; whoever calls this closes them."""
    if found.world_size == 1:
        from megalm.generate.ranks import TheseRanks
        from megalm.mesh.groups import ParallelContext
        from megalm.runs.load import device_of_one_process, load_part

        device = device_of_one_process(found.config.launch.device)
        return TheseRanks(load_part(found, ParallelContext.single(device)))
    from megalm.generate.started import StartedRanks

    return StartedRanks(found, overrides)
