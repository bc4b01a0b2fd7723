from __future__ import annotations

import pytest
import torch

from megalm.core.dropout import Dropout, attention_keep_mask, stream_key
from megalm.core.place import Place

B, S, H = 8, 64, 128


def place(first_sample: int = 0) -> Place:
    return Place(torch.arange(S), torch.arange(first_sample, first_sample + B))


def mask(probability: float = 0.3, *, seed: int = 1, layer: int = 0, site: str = "mlp", at: Place | None = None):
    at = at or place()
    return Dropout(probability, seed=seed, layer=layer, site=site)(torch.ones(B, S, H), at, at.positions) != 0


@pytest.mark.parametrize("probability", [0.02, 0.1, 0.5, 0.9])
def test_the_share_that_is_kept(probability: float) -> None:
    kept = mask(probability).double()
    deviation = (probability * (1 - probability) / kept.numel()) ** 0.5
    assert abs(float(kept.mean()) - (1 - probability)) < 5 * deviation
    for dim in (0, 1, 2):  # no sample, position or feature is treated otherwise
        means = kept.mean(dim=[d for d in range(3) if d != dim])
        spread = (probability * (1 - probability) / (kept.numel() / means.numel())) ** 0.5
        assert float((means - (1 - probability)).abs().max()) < 6 * spread


def test_what_is_kept_is_scaled_so_that_the_mean_stays() -> None:
    x = torch.randn(B, S, H, generator=torch.Generator().manual_seed(0))
    y = Dropout(0.25, seed=1, layer=0, site="mlp")(x, place(), place().positions)
    kept = y != 0
    torch.testing.assert_close(y[kept], x[kept] / 0.75)


def test_a_mask_replays_and_slices_agree_with_the_whole() -> None:
    whole = mask()
    assert torch.equal(whole, mask())
    drop = Dropout(0.3, seed=1, layer=0, site="mlp")
    positions = torch.tensor([3, 60, 7])  # as a context-parallel rank may hold them
    part = drop(torch.ones(2, 3, H), Place(positions, torch.tensor([5, 1])), positions) != 0
    assert torch.equal(part, whole[[5, 1]][:, positions])


@pytest.mark.parametrize(
    "other",
    [{"seed": 2}, {"layer": 1}, {"site": "attention"}, {"at": place(2**32)}, {"at": place(B)}],
    ids=["seed", "layer", "site", "sample beyond 32 bits", "sample"],
)
def test_masks_that_differ_in_one_key_are_unrelated(other: dict) -> None:
    agree = float((mask(0.5) == mask(0.5, **other)).double().mean())
    assert abs(agree - 0.5) < 5 * 0.5 / (B * S * H) ** 0.5


def test_neighbours_are_unrelated() -> None:
    kept = mask(0.5).double() - 0.5
    for dim in range(3):
        products = kept.narrow(dim, 0, kept.shape[dim] - 1) * kept.narrow(dim, 1, kept.shape[dim] - 1)
        assert abs(float(products.mean())) < 5 * 0.25 / products.numel() ** 0.5


def test_identity_where_there_is_nothing_to_drop() -> None:
    x = torch.randn(B, S, H)
    drop = Dropout(0.3, seed=1, layer=0, site="mlp")
    assert drop(x, Place(torch.arange(S)), torch.arange(S)) is x, "no samples, as in generation"
    assert drop.eval()(x, place(), torch.arange(S)) is x
    assert Dropout(0.0, seed=1, layer=0, site="mlp")(x, place(), torch.arange(S)) is x


def test_attention_masks_depend_on_places_not_on_layout() -> None:
    samples, heads, positions = torch.arange(4), torch.arange(6), torch.arange(16)
    key = torch.tensor(stream_key(1, 2, "attention"), dtype=torch.int32)
    whole = attention_keep_mask(0.4, key, samples, heads, positions, positions)
    assert whole.shape == (4, 6, 16, 16)
    assert abs(float(whole.double().mean()) - 0.6) < 0.03
    queries, keys = torch.tensor([1, 9]), torch.tensor([0, 15, 4])
    part = attention_keep_mask(0.4, key, samples[1:3], heads[3:], queries, keys)
    assert torch.equal(part, whole[1:3, 3:][:, :, queries][..., keys])
