"""Recomputation and compilation change what is kept and how fast it goes, never a number."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from megalm.config.schema import Config, Data, Engine, Model, Optim, Run, Train
from megalm.core.place import Place
from megalm.mesh.groups import ParallelContext
from megalm.models.micro_batch import MicroBatch
from megalm.models.transformer import Transformer, build_transformer
from megalm.objectives.registry import make_objective

MODEL = Model(
    num_layers=4, hidden_size=32, num_heads=4, sequence_length=16, vocab_size=61, dropout=0.2, attention_dropout=0.2
)


def build(engine: Engine, model: Model = MODEL) -> Transformer:
    config = Config(
        run=Run(name="x"),
        model=model,
        data=Data(path=("x",)),
        optim=Optim(lr=1.0),
        train=Train(steps=1, micro_batch_size=2, global_batch_size=2),
        engine=engine,
    )
    return build_transformer(
        config, 61, context=ParallelContext.single(), dtype=torch.float32, objective=make_objective(config.objective)
    ).train()


def run(gpt: Transformer) -> tuple[float, dict[str, torch.Tensor], int]:
    """Loss, gradients, and bytes of activations that backward kept."""
    tokens = torch.randint(0, 61, (2, 16), generator=torch.Generator().manual_seed(0))
    place = Place(torch.arange(16), torch.tensor([3, 9]))
    parameters = {p.untyped_storage().data_ptr() for p in gpt.parameters()}
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = gpt.run(0, None, MicroBatch(tokens, tokens, torch.ones(2, 16), place))["loss"]
    saved = sum(kept.values())
    loss.sum().backward()
    return float(loss.detach()), {name: p.grad for name, p in gpt.named_parameters()}, saved


def counted_forwards(gpt: Transformer) -> Counter[str]:
    calls: Counter[str] = Counter()
    for layer, block in gpt.blocks.items():
        block.mlp_norm.register_forward_pre_hook(lambda *_, layer=layer: calls.update([f"block {layer}"]))
        block.attention.core.register_forward_pre_hook(lambda *_, layer=layer: calls.update([f"core {layer}"]))
    return calls


@pytest.mark.parametrize(("mode", "every"), [("selective", 1), ("full", 1), ("full", 2), ("selective", 3)])
def test_gradients_are_the_same_to_the_last_bit_and_less_is_kept(mode: str, every: int) -> None:
    want_loss, want, want_saved = run(build(Engine()))
    gpt = build(Engine(recompute=mode, recompute_every=every))
    calls = counted_forwards(gpt)
    loss, gradients, saved = run(gpt)
    assert loss == want_loss
    assert all(torch.equal(gradients[name], want[name]) for name in want)
    assert saved < want_saved
    for layer in range(4):
        again = layer % every == 0
        assert calls[f"block {layer}"] == (2 if again and mode == "full" else 1)
        assert calls[f"core {layer}"] == (2 if again else 1)


def test_full_recomputation_keeps_little_but_the_inputs_of_blocks() -> None:
    _, _, everything = run(build(Engine()))
    _, _, inputs = run(build(Engine(recompute="full")))
    assert inputs < everything / 5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch.compile's own
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_compiled_blocks_share_one_graph_and_give_the_same_numbers(recompute: str) -> None:
    import torch._dynamo as dynamo

    model = replace(MODEL, num_layers=3)
    want_loss, want, _ = run(build(Engine(), model))
    dynamo.reset()
    dynamo.utils.counters.clear()
    loss, gradients, _ = run(build(Engine(compile=True, recompute=recompute), model))
    assert loss == pytest.approx(want_loss, rel=1e-5)
    for name, gradient in want.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-4)
    of_the_loss = 2  # its statistics and its gradient
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 1 + of_the_loss, "one for all layers"
