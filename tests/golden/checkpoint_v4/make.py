"""Makes the checkpoint of this folder, and of those of later versions: three steps on tp2·dp2·ep2 of a model with
experts, a buffer and a frozen block.

python tests/golden/checkpoint_v4/make.py FOLDER
"""

# ruff: noqa: E402 - the tests' own modules are found by the paths that are added first
from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / "dist"), str(Path(__file__).resolve().parents[3])]

from expert_layer import task_of
from parity import MODEL, Layout
from test_parameter_records import save_state

from megalm.checkpoint.reader import CheckpointReader
from megalm.checkpoint.store import locate
from megalm.core.parameters import freeze
from megalm.launch.function_ranks import call_on_ranks
from megalm.mesh.groups import ParallelContext
from megalm.mesh.slices import ShardSpec
from megalm.models.transformer import Transformer
from megalm.verify.parity import build_engine, train

LAYOUT = Layout(tp=2, dp=2, model=replace(MODEL, num_layers=2, hidden_size=8, num_heads=2, sequence_length=8))


def freeze_first_block(model: Transformer) -> None:
    """Of two."""
    freeze(model.blocks["0"])


def save(folder: Path) -> None:
    """On every rank."""
    context = ParallelContext.create(replace(LAYOUT.topology, inner_axes=(("ep", 2),)))
    config, task = LAYOUT.config(), replace(task_of(context), prepare=freeze_first_block)
    engine = build_engine(config, context, task)
    train(engine, config, task, steps=3)
    save_state(engine, folder)


def digests(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of every full tensor of every kind."""
    reader = CheckpointReader(checkpoint)
    return {
        f"{kind}/{name}": hashlib.sha256(
            reader.read_local(name, kind, ShardSpec.replicated(*record.shape)).numpy().tobytes()
        ).hexdigest()
        for name, record in reader.manifest.tensors.items()
        for kind in sorted({piece.kind for piece in record.pieces})
    }


if __name__ == "__main__":
    target = Path(sys.argv[1]).resolve()
    call_on_ranks(4, save, target, timeout_seconds=180.0)
    found = digests(locate(target).path)
    (target / "expected.json").write_text(json.dumps(found, indent=1) + "\n")
