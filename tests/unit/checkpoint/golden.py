"""What tests of the formats share: the folder of fixtures that other tools wrote, and a model that is a source's."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from megalm.convert.weights import WeightSource, full_shapes
from megalm.errors import CheckpointError
from megalm.models.transformer import build_full_model

GOLDEN = Path(__file__).resolve().parents[2] / "golden"


def logits_of(source: WeightSource, tokens: np.ndarray) -> np.ndarray:
    """[S] ▶ [S, V], by megalm's own model in fp32."""
    model = build_full_model(source.info.model, source.info.model.vocab_size or 0).eval()
    for p in model.tensors():
        p.tensor.data = source.read(p.name).float()
    with torch.no_grad():
        return model(torch.from_numpy(tokens)[None])[0].numpy()


def tensors_of(source: WeightSource) -> dict[str, torch.Tensor]:
    """All of them, by name."""
    return {name: source.read(name) for name in full_shapes(source.info.model)}


def refused(function, *fragments: str) -> str:
    """A call must be refused with a text that has these fragments; returns the text."""
    with pytest.raises(CheckpointError) as refusal:
        function()
    for fragment in fragments:
        assert fragment in str(refusal.value)
    return str(refusal.value)


def moved_out(file: Path, elsewhere: Path) -> None:
    """Put a file, or a folder, elsewhere, and a link to it where it was."""
    elsewhere.parent.mkdir(parents=True, exist_ok=True)
    file.rename(elsewhere)
    file.symlink_to(elsewhere)


class Marker:
    """Makes a folder when it is unpickled by anything that runs code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))
