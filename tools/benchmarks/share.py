"""Peak memory of ranks that generate: no rank may hold more of a model than its share and one tensor."""

from __future__ import annotations

from pathlib import Path

from benchmarks.table import Row
from megalm.launch.function_ranks import call_on_ranks

RANKS = 2
_MIB = 2**20
_NEW_TOKENS = 8


def rows(run: Path) -> list[Row]:
    """Of a run of megalm's, at tp2: what the largest rank holds once it has generated, and its peak until then.

    What a rank holds is what the system counts: the share of the weights in whole pages, which are of 2 MiB where the
    system has such, and keys, values and buffers of the libraries.

    Args:
        run: its folder.
    """
    peak, held, share, tensor = (
        max(values) / _MIB for values in zip(*call_on_ranks(RANKS, _measure, run), strict=True)
    )
    name = f"fp32, tp{RANKS}: memory of a rank"
    note = f"what it holds and one tensor, the largest: {tensor:.0f} MiB"
    return [
        Row(f"{name}: weights, its share", share, "MiB"),
        Row(f"{name}: held", held, "MiB"),
        Row(f"{name}: peak", peak, "MiB", held + tensor, at_most=True, note=note),
    ]


def _measure(run: Path) -> tuple[int, int, int, int]:
    """Bytes that this rank grew by at its peak and in the end, that its weights are, and that the largest tensor is."""
    from math import prod

    from megalm.generate.engine import Engine
    from megalm.generate.requests import GenerateRequest
    from megalm.generate.units import make_unit
    from megalm.mesh.groups import ParallelContext
    from megalm.mesh.topology import Topology
    from megalm.runs.find import find_model
    from megalm.runs.load import load_part

    context = ParallelContext.create(Topology(tp=RANKS))
    found = find_model(run, [f"parallel.tp={RANKS}"], RANKS)
    before = _reset_peak()
    trained = load_part(found, context)
    engine = Engine(trained.model, context, words=found.tokenizer.vocab_size, batch_size=2)
    request = GenerateRequest(tokens=tuple(range(16)), max_new_tokens=_NEW_TOKENS, ends=False)
    longest = found.config.model.sequence_length
    assert len(list(engine.generate([make_unit(0, request, found.tokenizer, longest)]))) == 1
    share = sum(parameter.nbytes for parameter in trained.model.parameters())
    largest = max(prod(each.shard.full_shape) * each.tensor.element_size() for each in trained.model.tensors())
    return _status("VmHWM") - before, _status("VmRSS") - before, share, largest


def _reset_peak() -> int:
    """Let the kernel forget the peak so far; the memory that the process has now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
