"""Makes torch process groups, each transport in the way that scales on it.

gloo has no notion of a split: the members of a group connect to each other and nobody else takes part. NCCL divides a
communicator by colour, in one call of all its ranks, however many groups come of it: see ``splits.py``.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megalm.mesh.splits import Split


class SplitMaker(Protocol):
    """Makes the groups of coloured splits, for one rank."""

    def split(self, split: Split, rank: int, parent: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
        """Make one split; collective over all ranks of the communicator that it divides.

        Args:
            split: which one.
            rank: this rank.
            parent: the group that is divided; None: the world.

        Returns:
            This rank's group; None: it becomes a member of none.
        """

    def alone(self, rank: int) -> dist.ProcessGroup:
        """A group of this rank alone, which has no communicator: what a library is given that insists on a group."""


class NcclSplits:
    """Divides NCCL's communicators.

    torch makes a new group of ``new_group`` by a split, too, once a device is bound to the world: every rank names its
    own group, so all of them are made in one call. What is torch's choice there, and is made here, are the colour (a
    hash of the members, which two groups may share) and the communicator that is divided (always the world's). Both are
    fields of the group's options, which torch sets just before it makes the communicator.
    """

    def split(self, split: Split, rank: int, parent: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
        """See the base class."""
        world = dist.group.WORLD
        assert world is not None
        device = world.bound_device_id
        if device is None:
            raise RuntimeError("NCCL splits communicators that exist: init_process_group needs a device_id")
        divided = (parent or world)._get_backend(device)
        if not divided.supports_splitting:
            raise RuntimeError("this NCCL cannot split communicators; megalm needs 2.18 or newer")
        members, colour = split.members(rank), split.colour(rank)
        if members is None or colour is None:
            divided.perform_nocolor_split(device)  # type: ignore[attr-defined]  # NCCL's has
            return None
        options = split_options(dist.ProcessGroupNCCL.Options, divided, colour)
        options._timeout = divided.options._timeout
        return _local_group(members, pg_options=options, timeout=options._timeout, group_desc=split.name)

    def alone(self, rank: int) -> dist.ProcessGroup:
        """See the base class."""
        return _group_of_one(rank)


class FakeSplits:
    """What :class:`NcclSplits` makes, in a process group that does not communicate: torch's fake one, of a dry run."""

    def split(self, split: Split, rank: int, parent: dist.ProcessGroup | None) -> dist.ProcessGroup | None:  # noqa: ARG002 - the fake group has nothing to divide
        """See the base class."""
        members = split.members(rank)
        return None if members is None else _local_group(members, group_desc=split.name)

    def alone(self, rank: int) -> dist.ProcessGroup:
        """See the base class."""
        return _group_of_one(rank)


def split_maker() -> SplitMaker:
    """The one for the initialised process group: a dry run's has another backend than the transport it stands for."""
    return FakeSplits() if dist.get_backend() == "fake" else NcclSplits()


def local_group(ranks: tuple[int, ...]) -> dist.ProcessGroup:
    """A gloo group of ``ranks``, this one among them; only they take part, which keeps the start flat in world size.

    A rank by itself has nothing to connect, and is spared gloo's three threads, one of which wakes every 10 ms.
    """
    if len(ranks) == 1:
        return _group_of_one(ranks[0])
    world = dist.group.WORLD
    assert world is not None
    backend = world._get_backend(torch.device("cpu"))
    timeout = getattr(getattr(backend, "options", None), "_timeout", None)
    return _local_group(ranks, timeout=timeout)


def split_options(base: type[Any], parent: Any, colour: int) -> Any:
    """Options of a group, in which colour and parent stay as they are given, whatever torch sets them to afterwards.

    Args:
        base: ``ProcessGroupNCCL.Options``.
        parent: backend of the group that is divided.
        colour: of the new group.
    """

    class Options(base):  # type: ignore[misc]
        """The base class, with two fields that cannot be set again."""

        @property
        def split_from(self) -> Any:
            return base.split_from.__get__(self)  # type: ignore[attr-defined]

        @split_from.setter
        def split_from(self, value: Any) -> None:
            """Torch would divide the world."""

        @property
        def split_color(self) -> int:
            found: int = base.split_color.__get__(self)  # type: ignore[attr-defined]
            return found

        @split_color.setter
        def split_color(self, value: int) -> None:
            """Torch would hash the members."""

    options = Options()
    base.split_from.__set__(options, parent)  # type: ignore[attr-defined]
    base.split_color.__set__(options, colour)  # type: ignore[attr-defined]
    return options


def _local_group(ranks: tuple[int, ...], timeout: timedelta | None = None, **more: Any) -> dist.ProcessGroup:
    group = dist.new_group(list(ranks), timeout=timeout, use_local_synchronization=True, **more)
    assert isinstance(group, dist.ProcessGroup)
    return group


def _group_of_one(rank: int) -> dist.ProcessGroup:
    """Of torch's fake backend, which leaves tensors as they are: right for one member, and nothing is connected."""
    import torch.testing._internal.distributed.fake_pg  # noqa: F401 - registers the backend, as torch itself does

    return _local_group((rank,), backend="fake", group_desc="alone")
