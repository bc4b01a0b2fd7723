"""What is checked: a config on a number of ranks, with its datasets; and what rules calculate with. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import wraps
from math import gcd
from typing import Any, Protocol

from megalm.config.schema import Config
from megalm.config.support import BOUNDS
from megalm.config.violation import Violation
from megalm.mesh.topology import Topology


class Dataset(Protocol):
    """What the rules need to know of a prepared dataset.

    Attributes:
        location: where it is, as messages name it.
        vocab_size: words of its tokenizer.
        chunk_tokens: tokens per chunk, of which a sequence takes a whole fraction.
        packed_length: the only sequence length of a dataset that was packed; 0: it was not.
        masked: whether a loss mask says which of its tokens carry loss.
    """

    @property
    def location(self) -> str: ...  # noqa: D102

    @property
    def vocab_size(self) -> int: ...  # noqa: D102

    @property
    def chunk_tokens(self) -> int: ...  # noqa: D102

    @property
    def packed_length(self) -> int: ...  # noqa: D102

    @property
    def masked(self) -> bool: ...  # noqa: D102


@dataclass(frozen=True)
class Job:
    """What is checked: a config, the number of ranks it is to run on, and its datasets where they can be read."""

    config: Config
    world_size: int
    datasets: tuple[Dataset, ...] = ()

    @property
    def data_lengths(self) -> tuple[int, ...]:
        """Sequence lengths that all of its datasets take, ascending; none where there are no datasets, or no such."""
        if not self.datasets:
            return ()
        lengths = divisors(gcd(*(dataset.chunk_tokens for dataset in self.datasets)))
        packed = {dataset.packed_length for dataset in self.datasets} - {0}
        return tuple(length for length in lengths if packed <= {length})


Rule = Callable[[Job], Iterator[Violation]]


def world_size_of(config: Config) -> int:
    """Ranks that ``megalm train`` starts on this machine: ``launch.ranks``, or as many as tp·pp·cp."""
    parallel = config.parallel
    return config.launch.ranks or parallel.tp * parallel.pp * parallel.cp


def planned_world_size_of(config: Config) -> int:
    """Ranks of the job that is planned: ``cluster.gpus``, or what would be started on this machine."""
    return config.cluster.gpus or world_size_of(config)


def topology_of(config: Config, world_size: int) -> Topology:
    """The topology of a valid config on ``world_size`` ranks; the data-parallel degree fills them."""
    parallel = config.parallel
    return Topology.from_world_size(
        world_size, tp=parallel.tp, pp=parallel.pp, cp=parallel.cp, virtual_stages=parallel.virtual_stages
    )


def needs(*paths: str) -> Callable[[Rule], Rule]:
    """Apply a rule only where the numbers it calculates with are in range; a wrong one is reported on its own."""

    def decorate(rule: Rule) -> Rule:
        @wraps(rule)
        def guarded(job: Job) -> Iterator[Violation]:
            if job.world_size >= 1 and all(is_in_bounds(job.config, path) for path in paths):
                yield from rule(job)

        return guarded

    return decorate


def divisors(number: int) -> tuple[int, ...]:
    """All divisors of a positive integer, ascending."""
    small = [candidate for candidate in range(1, int(number**0.5) + 1) if number % candidate == 0]
    return tuple(sorted({*small, *(number // candidate for candidate in small)}))


def value_of(config: Config, path: str) -> Any:
    """The value at a dotted path such as ``parallel.tp``."""
    section, name = path.split(".")
    return getattr(getattr(config, section), name)


def with_value(config: Config, path: str, value: Any) -> Config:
    """A copy of ``config`` with one field changed."""
    section, name = path.split(".")
    changed: Any = {section: replace(getattr(config, section), **{name: value})}
    return replace(config, **changed)


def is_in_bounds(config: Config, path: str) -> bool:
    """Whether a number is within its range, so that other rules can calculate with it."""
    return all_in_bounds(path, value_of(config, path))


def all_in_bounds(path: str, value: Any) -> bool:
    """Whether a field's number, or all of its numbers, are within its range; null is."""
    numbers = value if isinstance(value, tuple) else () if value is None else (value,)
    return all(BOUNDS[path].contain(number) for number in numbers)
