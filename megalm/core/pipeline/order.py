"""The order in which a rank issues its work and its transfers, for the two ways in which transfers can be grouped.

*Early*: in a tick, a rank first posts what it will receive in this tick, then does its action, then sends the result.
A transfer is under way while the receiver works, and needs the buffers of one tick (at most two) more than if they were
made after the work. Each directed pair of ranks has a *link* of its own, on which transfers happen one after another.

*Grouped*: a rank does its action, then issues all sends and receives of the tick as one group on the communicator of
the whole pipeline. A group waits for its partners, so no transfer is hidden behind work that comes after it in the
plan.

Why early receives cannot deadlock. Number what is issued by (tick, phase), with the phases receive, work, send. Work
waits for transfers of earlier ticks. A transfer waits for both of its ends, which are in one tick, and for transfers of
earlier ticks on its link. So everything waits for what has a smaller number, or for the other end of the same transfer,
whose own waits have smaller numbers; the smallest number that is not done can always proceed. It holds for all ranks of
a job together, with collectives inside the work, since those who take part in one are in the same phase of the same
tick. :func:`megalm.core.pipeline.timing.replay` checks it for a given order. On one communicator for all pairs the
order does deadlock: a rank's send would queue behind a receive whose sender waits for it.

No torch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megalm.core.pipeline.schedule import Action, ScheduleError, Tick, Transfer

Link = tuple[int, int]
"""(source, target) pipeline ranks of a communicator that carries transfers in this direction alone."""


@dataclass(frozen=True)
class Exchange:
    """Transfers that a rank issues together.

    Attributes:
        transfers: those that end or begin at this rank.
        link: the communicator; None: that of the whole pipeline.
    """

    transfers: tuple[Transfer, ...]
    link: Link | None = None


Issue = Action | Exchange
"""What a rank issues."""


def issues(tick: Tick, *, early: bool) -> Iterator[Issue]:
    """What a rank issues in a tick, in order.

    Args:
        tick: one of this rank's.
        early: whether receives are posted before the work, each transfer on its link; else they are grouped.
    """
    if early:
        for transfer in tick.receives:
            if transfer.source != transfer.target:
                yield Exchange((transfer,), (transfer.source, transfer.target))
    if tick.action is not None:
        yield tick.action
    if early:
        for transfer in tick.sends:
            yield Exchange((transfer,), (transfer.source, transfer.target))
    elif tick.sends or tick.receives:
        received = tuple(transfer for transfer in tick.receives if transfer.source != transfer.target)
        yield Exchange((*tick.sends, *received))


def orders(ticks: Sequence[Sequence[Tick]], *, early: bool) -> list[list[Issue]]:
    """What each pipeline rank issues in a pass, in order, from the ranks' ticks."""
    return [[issue for tick in of_rank for issue in issues(tick, early=early)] for of_rank in ticks]


def assert_paired(of_ranks: Sequence[Sequence[Issue]]) -> None:
    """From each rank to each other, on each communicator, what is sent is what is received, in the same order.

    Raises:
        ScheduleError: it is not; a receiver would take one tensor for another, or wait for ever.
    """
    sent: dict[tuple[Link | None, int, int], list[Transfer]] = defaultdict(list)
    received: dict[tuple[Link | None, int, int], list[Transfer]] = defaultdict(list)
    for rank, order in enumerate(of_ranks):
        for issue in order:
            if isinstance(issue, Exchange):
                for transfer in issue.transfers:
                    if transfer.source != transfer.target:
                        side = sent if transfer.source == rank else received
                        side[issue.link, transfer.source, transfer.target].append(transfer)
    for key in sent.keys() | received.keys():
        for number in range(max(len(sent[key]), len(received[key]))):
            source, target = (side[key][number : number + 1] for side in (sent, received))
            if source != target:
                _, first, second = key
                raise ScheduleError(
                    f"transfer {number} from pipeline rank {first} to {second}: {_spoken(source)} is sent, "
                    f"{_spoken(target)} is received"
                )


def _spoken(transfers: list[Transfer]) -> str:
    if not transfers:
        return "nothing"
    (t,) = transfers
    return f"the {'gradient' if t.is_gradient else 'activation'} of micro-batch {t.micro_batch} for stage {t.stage}"
