"""What a rank tells rank 0 of the pieces that it wrote. No torch.

JSON: ``cuts``, a table of them, each as text; ``seal``, of the rank's file; and ``runs``, a list of ``["[name, shape,
whether it is trained]", "kind,kind", [share of the tensor's fingerprint, by kind], [number of the cuts, start, length,
and so on for each run]]``. Rank 0 reads one from each rank, so that there is as little to parse as there can be.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from megalm.checkpoint.columns import CutTable, cuts_to_json
from megalm.checkpoint.pieces import FINGERPRINT_MODULUS, SEAL_DIGITS
from megalm.mesh.parameter import StateRun

NO_SEAL = "0" * SEAL_DIGITS
"""Of a rank that wrote no file."""


def index_of(runs: Iterable[tuple[StateRun, int]], seal: str = NO_SEAL) -> str:
    """The text of an index.

    Args:
        runs: that were written, each with its share of its tensor's fingerprint.
        seal: of the file.
    """
    table = CutTable()
    places: dict[str, dict[tuple[int, int, int], dict[str, int]]] = {}
    for run, share in runs:
        tensor = _compact([run.name, run.shard.full_shape, run.record.trainable])
        place = table.number(cuts_to_json(run.shard.cuts)), run.flat_start, run.length
        places.setdefault(tensor, {}).setdefault(place, {})[run.kind] = share
    # Runs that have the same kinds, as all have that hold what is trained, are one entry.
    entries: dict[tuple[str, str], tuple[list[int], list[int]]] = {}
    for tensor, found in places.items():
        for place, of_kinds in found.items():
            shares, own = entries.setdefault((tensor, ",".join(of_kinds)), ([0] * len(of_kinds), []))
            for number, share in enumerate(of_kinds.values()):
                shares[number] = (shares[number] + share) % FINGERPRINT_MODULUS
            own += place
    fields = [[*key, *values] for key, values in entries.items()]
    return _compact({"cuts": table.texts, "seal": seal, "runs": fields})


def _compact(fields: Any) -> str:
    return json.dumps(fields, separators=(",", ":"))
