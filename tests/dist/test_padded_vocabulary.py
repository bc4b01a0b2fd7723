"""Rows of the vocabulary are padded for GPUs: no number changes, padding is never trained, and never saved."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from harness import run_ranks
from parity import MODEL, Layout

from megalm.config.schema import Model
from megalm.verify.parity import Trace, train_on_layout
from tests.families import bert_of

UNTIED = replace(MODEL, hidden_size=48, vocab_size=301, tie_embeddings=False)
BERT = bert_of(MODEL)
MODELS = {"tied": MODEL, "untied": UNTIED, "bert": BERT}
MULTIPLES = (1, 8, 128)
_TAILS = {"masked_lm.bias", "masked_lm.norm.bias"}
"""torch's fused AdamW on the CPU computes 16 elements at a time and rounds the last few of a tensor otherwise: with
padding, others are the last, of the parameter (ZeRO-0) or of its bucket (ZeRO-1)."""


def train_with_multiples(layout: Layout, multiples: tuple[int, ...]) -> list[Trace]:
    """Runs on every rank: the same layout with the rows of each rank rounded up to each multiple."""
    return [
        train_on_layout(
            replace(layout, model=replace(layout.model, vocab_pad_multiple=multiple)).config(), layout.topology
        )
        for multiple in multiples
    ]


@pytest.mark.parametrize("zero_stage", [0, 1])
@pytest.mark.parametrize("name", MODELS)
def test_on_one_rank_no_bit_changes(name: str, zero_stage: int) -> None:
    layout = Layout(model=MODELS[name], zero_stage=zero_stage, z_loss=1e-2)
    (traces,) = run_ranks(1, train_with_multiples, layout, MULTIPLES)
    for one, other in pairwise(traces):
        assert one.losses == other.losses
        assert one.terms == other.terms
        assert one.grad_norms == pytest.approx(other.grad_norms, rel=1e-15), "sums in fp64"
        assert one.final.keys() == other.final.keys()
        for weight in one.final:
            if weight in _TAILS:
                torch.testing.assert_close(one.final[weight], other.final[weight], rtol=0, atol=1e-10)
            else:
                assert torch.equal(one.final[weight], other.final[weight]), weight


# --- all rows multiplied, as GPUs do ----------------------------------------------------------------------------------


def train_as_gpus_multiply(layouts: list[Layout]) -> list[Trace]:
    """Runs on every rank: products take the padding, which the CPU leaves out."""
    from megalm.core import embedding

    embedding.device_kind = lambda _: "cuda"  # this process is a fork of its own
    return [train_on_layout(layout.config(), layout.topology) for layout in layouts]


@pytest.mark.parametrize(
    ("ranks", "layouts"),
    [
        (1, [Layout(model=model, z_loss=1e-2) for model in MODELS.values()]),
        (1, [Layout(dtype="bf16"), Layout(dtype="fp16"), Layout(zero_stage=3)]),
        (2, [Layout(tp=2, sp=True, z_loss=1e-2), Layout(tp=2, model=UNTIED), Layout(tp=2, model=BERT)]),
    ],
    ids=["models", "formats", "tp2"],
)
def test_products_with_padding_learn_the_same(ranks: int, layouts: list[Layout]) -> None:
    plain = [replace(layout, model=replace(layout.model, vocab_pad_multiple=1)) for layout in layouts]
    padded = run_ranks(ranks, train_as_gpus_multiply, layouts)
    want = run_ranks(ranks, train_as_gpus_multiply, plain)
    for rank in range(ranks):
        for layout, got, expected in zip(layouts, padded[rank], want[rank], strict=True):
            loss, norm = (1e-6, 2e-6) if layout.dtype == "fp32" else (2e-3, 2e-2)
            assert got.losses == pytest.approx(expected.losses, abs=loss), str(layout)
            assert got.grad_norms == pytest.approx(expected.grad_norms, rel=norm), str(layout)


# --- what is in the padding -------------------------------------------------------------------------------------------


def rows_and_pieces(models: list[Model], tp: int, everything: bool) -> list[dict[str, object]]:
    """Runs on every rank: trains six steps, and looks at the padding of weights, masters, moments and pieces."""
    from megalm.core import embedding
    from megalm.engine.deepspeed_engine import DeepSpeedEngine
    from megalm.mesh.groups import ParallelContext
    from megalm.models.transformer import build_transformer
    from megalm.objectives.registry import make_objective
    from megalm.verify.parity import micro_batches_of_rank

    if everything:
        embedding.device_kind = lambda _: "cuda"
    found = []
    for model in models:
        layout = Layout(tp=tp, model=model)
        config = layout.config()
        context = ParallelContext.create(layout.topology)
        stage = build_transformer(
            config,
            model.vocab_size or 0,
            context=context,
            dtype=torch.float32,
            objective=make_objective(config.objective),
        )
        engine = DeepSpeedEngine(stage, context, config)
        for step in range(6):
            engine.train_step(micro_batches_of_rank(config, step, context, stage.context_parallel), 1e-3)
        of_words = [t for t in engine.tensors if t.record.per_word]
        padding = [
            values[max(t.shard.saved.local_numel - start, 0) :]
            for t in of_words
            for _, start, values in engine._optimizer.fragments(t.parameter)
        ]
        found.append(
            {
                "rows": [t.shard.local_shape[0] for t in of_words],
                "words": [t.shard.saved.local_shape[0] for t in of_words],
                "padding": [(p.numel(), float(p.abs().sum())) for p in padding],
                "weights": [float(t.tensor[t.shard.saved.local_shape[0] :].abs().sum()) for t in of_words],
                "saved": {
                    (piece.name, piece.kind): (piece.shard.cuts[0].padding, piece.flat_start, piece.values.numel())
                    for piece in engine.state_pieces()
                    if piece.record.per_word
                },
            }
        )
    return found


@pytest.mark.parametrize(("tp", "everything"), [(1, False), (2, True), (4, True)])
def test_padding_is_zero_after_training_and_not_saved(tp: int, everything: bool) -> None:
    models = [UNTIED, BERT]
    ranks = run_ranks(tp, rows_and_pieces, models, tp, everything)
    for number, model in enumerate(models):
        share = -(-(model.vocab_size or 0) // tp)
        words = [0, 0]
        for rank in range(tp):
            found = ranks[rank][number]
            assert found["rows"] == [-(-share // 128) * 128] * 2
            assert all(size and not total for size, total in found["padding"]), "masters and moments: there, and zero"
            assert not any(found["weights"])
            for i, held in enumerate(found["words"]):
                words[i] += held
            sizes = {size for padding, start, size in found["saved"].values() if not padding and not start}
            width = model.hidden_size
            assert sizes == {held * w for held in found["words"] for w in ({width, 1} if model is BERT else {width})}
        assert words == [model.vocab_size] * 2


def generated_logits(model: Model, tp: int, everything: bool) -> torch.Tensor:
    """Runs on every rank: logits of all words, as generation has them."""
    from megalm.config.schema import Engine
    from megalm.core import embedding
    from megalm.core.attention.context_parallel import ContextParallel
    from megalm.core.random import initialise
    from megalm.core.tensor_parallel import TensorParallel
    from megalm.mesh.groups import ParallelContext
    from megalm.mesh.topology import Topology
    from megalm.models.transformer import Part, Transformer

    if everything:
        embedding.device_kind = lambda _: "cuda"
    context = ParallelContext.create(Topology(tp=tp))
    part = Transformer(
        model,
        model.vocab_size or 0,
        part=Part({0: range(model.num_layers)}, 1),
        tensor_parallel=TensorParallel(context.tp_group),
        context_parallel=ContextParallel(),
        engine=Engine(),
        objective=None,
        seed=3,
        device=torch.device("cpu"),
    ).eval()
    initialise(part.tensors(), 3)
    tokens = torch.arange(2 * model.sequence_length).view(2, -1) % (model.vocab_size or 1)
    with torch.no_grad():
        return part(tokens)


@pytest.mark.parametrize(("tp", "everything"), [(1, True), (2, False), (4, True)])
@pytest.mark.parametrize("name", ["untied", "bert"])
def test_generation_sees_every_word_once_and_no_padding(name: str, tp: int, everything: bool) -> None:
    model = MODELS[name]
    (want,) = run_ranks(1, generated_logits, replace(model, vocab_pad_multiple=1), 1, False)
    for logits in run_ranks(tp, generated_logits, model, tp, everything):
        assert logits.shape == (2, model.sequence_length, model.vocab_size)
        torch.testing.assert_close(logits, want, atol=2e-6, rtol=1e-5)
