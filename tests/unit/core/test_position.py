from __future__ import annotations

import math

import pytest
import torch

from megalm.config.schema import Model
from megalm.core.position import RotaryPosition, rotary_frequencies


def model(**changes) -> Model:
    defaults = {
        "num_layers": 1,
        "hidden_size": 128,
        "num_heads": 2,
        "sequence_length": 64,
        "position": "rotary",
    }
    return Model(**{**defaults, **changes})


def rotate(m: Model, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return RotaryPosition(m, device=torch.device("cpu"))(x, positions)


def test_scores_depend_on_distance_alone() -> None:
    m = model()
    query, key = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).unbind()

    def score(i: int, j: int) -> float:
        q = rotate(m, query.view(1, 1, 1, -1), torch.tensor([i]))
        k = rotate(m, key.view(1, 1, 1, -1), torch.tensor([j]))
        return float((q * k).sum())

    assert score(3, 1) == pytest.approx(score(50, 48), abs=1e-4)
    assert abs(score(3, 1) - score(3, 2)) > 1e-3


def test_rows_are_turned_by_their_own_positions_in_any_order() -> None:
    m = model(rotary_fraction=0.5)
    x = torch.randn(2, 2, 64, 64)
    order = torch.randperm(64)
    whole = rotate(m, x, torch.arange(64))
    torch.testing.assert_close(rotate(m, x[:, :, order], order), whole[:, :, order])


def test_partial_rotation_leaves_the_rest_alone() -> None:
    m = model(rotary_fraction=0.25)
    x = torch.randn(1, 2, 64, 64)
    y = rotate(m, x, torch.arange(64))
    assert torch.equal(y[..., 16:], x[..., 16:])
    # As a head of 16 elements would be turned.
    small = model(hidden_size=32, num_heads=2)
    torch.testing.assert_close(y[..., :16], rotate(small, x[..., :16], torch.arange(64)))


def test_linear_scaling_is_a_finer_grid_of_positions() -> None:
    plain, _ = rotary_frequencies(model())
    scaled, amplitude = rotary_frequencies(model(rotary_scaling="linear", rotary_factor=4.0))
    torch.testing.assert_close(scaled * 8, plain * 2)
    assert amplitude == 1.0


def test_llama3_keeps_short_wavelengths_and_stretches_long_ones() -> None:
    m = model(
        rotary_scaling="llama3",
        rotary_factor=8.0,
        rotary_original_length=8192,
        rotary_base=500000.0,
        rotary_low_frequency_factor=1.0,
        rotary_high_frequency_factor=4.0,
    )
    plain, _ = rotary_frequencies(model(rotary_base=500000.0))
    scaled, _ = rotary_frequencies(m)
    for before, after in zip(plain.tolist(), scaled.tolist(), strict=True):
        wavelength = 2 * math.pi / before
        if wavelength < 8192 / 4:
            want = before
        elif wavelength > 8192 / 1:
            want = before / 8
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            want = (1 - smooth) * before / 8 + smooth * before
        assert after == pytest.approx(want, rel=1e-12)
    assert any(8192 / 4 < 2 * math.pi / f < 8192 for f in plain.tolist()), "the ramp is not empty"


def test_yarn_sharpens_attention_and_mixes_by_turns() -> None:
    m = model(rotary_scaling="yarn", rotary_factor=4.0, rotary_original_length=2048)
    plain, _ = rotary_frequencies(model())
    scaled, amplitude = rotary_frequencies(m)
    assert amplitude == pytest.approx(0.1 * math.log(4.0) + 1.0)
    ratio = (scaled / plain).tolist()
    turns = (2048 * plain / (2 * math.pi)).tolist()
    assert all(r == pytest.approx(1.0) for r, t in zip(ratio, turns, strict=True) if t > 64)
    assert all(r == pytest.approx(0.25) for r, t in zip(ratio, turns, strict=True) if t < 0.5)
    assert ratio == sorted(ratio, reverse=True)
    assert any(0.3 < r < 0.9 for r in ratio)


@pytest.mark.parametrize("scaling", ["linear", "llama3", "yarn"])
def test_scalings_are_those_of_transformers(scaling: str) -> None:
    rope = pytest.importorskip("transformers.modeling_rope_utils")
    from transformers import LlamaConfig

    parameters = {
        "rope_type": scaling,
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 2048,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    config = LlamaConfig(hidden_size=128, num_attention_heads=2, max_position_embeddings=8192)
    config.rope_parameters = parameters
    want, amplitude = rope.ROPE_INIT_FUNCTIONS[scaling](config, torch.device("cpu"))
    ours, factor = rotary_frequencies(model(rotary_scaling=scaling, rotary_factor=4.0, rotary_original_length=2048))
    torch.testing.assert_close(ours.float(), want)
    assert factor == pytest.approx(amplitude)
