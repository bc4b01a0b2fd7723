"""One folder, one owner: a lock that names its owner, holds across hosts, and is free when its owner is dead. No torch.

The lock is a folder with one file in it, whose name is the owner's token and whose content says who that is. It needs
two atomic operations, which NFS and other shared file systems have: a prepared folder is *renamed* to the lock's name,
which fails while a folder with something in it has that name; and a dead owner's file is *removed* by its unique name,
so that one who was slow to judge cannot remove the lock of another. Of any number of newcomers one wins.

Whether an owner lives is asked where it is known. On its own machine: whether its process exists (a number that was
given out again has another start time), and whether ``flock`` on the file is held, which the processes that it started
hold too. From another machine: the heartbeat, renewed in the file every few seconds, must not change for a minute
*while it is watched*; no two machines' clocks are compared. A job that a scheduler runs again has ended its attempt
before.
"""

from megalm.ownership.claim import Claim
from megalm.ownership.lock import Ownership, WaitEndedError, acquire, beside, owned
from megalm.ownership.record import Identity

__all__ = ["Claim", "Identity", "Ownership", "WaitEndedError", "acquire", "beside", "owned"]
