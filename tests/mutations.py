"""Makes ten mistakes on purpose, one in each package, in a copy of the checkout, and runs the tests that should notice.

    .venv/bin/python tests/mutations.py          all; exits 1 if one goes unnoticed

``tests/unit/test_mutations.py`` holds that each mistake can still be made: its text is in the code exactly once.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from tests.checkout import copy_checkout


@dataclass(frozen=True)
class Mutation:
    """A mistake: what it means, where, which text becomes which, and the tests that should notice."""

    meaning: str
    file: str
    text: str
    mistake: str
    tests: tuple[str, ...]


MUTATIONS = (
    Mutation(
        "every tensor-parallel rank counts and saves what they all hold",
        "megalm/mesh/parameter.py",
        'if "tp" not in self.split_over and topology.coordinates(rank).tp:',
        "if False:",
        ("tests/unit/mesh",),
    ),
    Mutation(
        "a bound excludes its own end",
        "megalm/config/support.py",
        "above = value > self.low if self.low_open else value >= self.low",
        "above = value > self.low",
        ("tests/unit/config",),
    ),
    Mutation(
        "1F1B warms up with one forward too few",
        "megalm/core/pipeline/schedule.py",
        "warm_up=shape.degree - rank - 1)",
        "warm_up=max(shape.degree - rank - 2, 0))",
        ("tests/unit/core/test_pipeline.py",),
    ),
    Mutation(
        "the output projection is not counted",
        "megalm/models/counts.py",
        "output=(0 if model.tie_embeddings else vocab * model.hidden_size)",
        "output=0",
        ("tests/unit/models",),
    ),
    Mutation(
        "a masked word is always replaced by the mask",
        "megalm/objectives/mlm.py",
        "tokens = np.where(chosen & (fate < _MASKED), self.mask_id, labels)",
        "tokens = np.where(chosen, self.mask_id, labels)",
        ("tests/unit/objectives",),
    ),
    Mutation(
        "the order of data is another, though still a permutation",
        "megalm/data/stream/order.py",
        "round_key = _mix(keys[walking] + np.uint64(number))",
        "round_key = _mix(keys[walking] + np.uint64(number + 1))",
        ("tests/unit/data/stream",),
    ),
    Mutation(
        "gradients of experts are added over all replicas",
        "megalm/engine/optimizer.py",
        "replicas=context.replicas_of(found[0].record),",
        "replicas=context.replica_group,",
        ("tests/dist/test_parameter_records.py",),
    ),
    Mutation(
        "damaged bytes of a checkpoint are taken",
        "megalm/checkpoint/reader.py",
        "if hashlib.sha256(as_bytes(tensor)).hexdigest() != (piece.sha256 or self._sealed_sha256(piece)):",
        "if False:",
        ("tests/unit/checkpoint",),
    ),
    Mutation(
        "ranks are not told that the run's folder is theirs",
        "megalm/launch/job.py",
        'claim=None if claim is None else Claim(**{**claim, "lock": Path(claim["lock"])}),',
        "claim=None,",
        ("tests/unit/launch/test_job.py",),
    ),
    Mutation(
        "query, key and value rows of GPT-NeoX are not interleaved by head",
        "megalm/convert/huggingface/neox.py",
        "heads = GroupedHeads(model.num_heads, model.num_heads, model.head_size)",
        "heads = GroupedHeads(model.num_heads, model.num_heads // 2, model.head_size)",
        ("tests/unit/convert/huggingface/test_library.py",),
    ),
)


def main() -> int:
    """Make each mistake and report which test noticed."""
    unnoticed = 0
    with tempfile.TemporaryDirectory(prefix="megalm-mutations-") as name:
        copy = copy_checkout(Path(name) / "megalm")
        for mutation in MUTATIONS:
            path = copy / mutation.file
            sound = path.read_text(encoding="utf-8")
            path.write_text(sound.replace(mutation.text, mutation.mistake), encoding="utf-8")
            failed = _first_failure(copy, mutation.tests)
            path.write_text(sound, encoding="utf-8")
            unnoticed += failed is None
            print(f"{'caught' if failed else 'UNNOTICED':9}  {mutation.file}: {mutation.meaning}")
            print(f"           {failed or ' '.join(mutation.tests)}", flush=True)
    print(f"{len(MUTATIONS) - unnoticed} of {len(MUTATIONS)} caught")
    return 1 if unnoticed else 0


def _first_failure(checkout: Path, tests: tuple[str, ...]) -> str | None:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return lines[0].partition(" - ")[0].split(" ", 1)[1] if lines else done.stdout[-300:]


if __name__ == "__main__":
    sys.exit(main())
