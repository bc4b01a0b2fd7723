"""The commands of ``megalm``, by name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """One line of the table; its code is ``main(arguments, prog)`` of ``megalm.cli.NAME``.

    Attributes:
        help: what it does, in one line.
        works: whether its result is on the disk, so that it goes on after its terminal or pipe is closed; the others
            only print, and end then.
    """

    help: str
    works: bool = False


COMMANDS = {
    "train": Command(
        "Train a run, or resume it; starts its own ranks unless torchrun, srun or mpirun has.", works=True
    ),
    "check": Command("Check a configuration for cluster.gpus GPUs, in a second, without starting anything."),
    "dryrun": Command(
        "Execute the step of one rank of any job without its devices: memory, FLOPs, messages, waits of the host."
    ),
    "verify": Command(
        "Prove that a config's layout trains like one process: shrunk, on this machine's CPU, in a minute.", works=True
    ),
    "evaluate": Command("Loss and perplexity of a run, or what it reaches in tasks; of two runs, which is better."),
    "generate": Command("Generate text from a prompt with a run's model."),
    "compare": Command("What two or more runs have reached, in a table and a picture, and what differs between them."),
    "tokenizer": Command("Train a tokenizer on a corpus, or take one that is there.", works=True),
    "prepare": Command("Prepare a corpus for training: documents to tokens to shards.", works=True),
    "data": Command("Show a dataset's text and documents, or which documents a step of a run saw."),
    "convert": Command("Convert a model between megalm's checkpoints and other formats.", works=True),
    "inspect": Command("Show what a checkpoint holds, prove it intact, or say what differs between two."),
}
