"""Layers split over ranks against the same layers in one process: outputs, input gradients and weight gradients.

In fp64, so that a wrong term cannot hide in rounding. Cases differ in the degree, in sequence parallelism, and in
whether the weight gradients are computed in backward or postponed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from harness import run_ranks
from torch import Tensor, nn
from torch.nn import functional as F

B, S, H, FFN, V = 2, 8, 12, 16, 19
"""19 words on 2 or 4 ranks: the last rank's rows are padded."""


@dataclass(frozen=True)
class Case:
    tp: int
    sequence_parallel: bool
    zero_bubble: bool
    parts: int = 1

    def __str__(self) -> str:
        options = [n for n, on in (("sp", self.sequence_parallel), ("zb", self.zero_bubble)) if on]
        return "·".join([f"tp{self.tp}", *options, *([f"parts{self.parts}"] if self.parts > 1 else [])])


CASES = [Case(tp, sp, zb) for tp in (1, 2, 4) for sp in (False, True) for zb in (False, True)]
CASES += [Case(tp, sp, zb, parts) for tp in (2, 4) for sp in (False, True) for zb in (False, True) for parts in (2, 3)]
"""Of two sequences: one each in 2 parts; in 3, uneven parts of a share's tokens, or fewer of two."""

CASES = [case for case in CASES if case.tp > 1 or not case.sequence_parallel]


def values(*shape: int, salt: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(salt), dtype=torch.float64)


TOKENS = torch.randint(0, V, (B, S), generator=torch.Generator().manual_seed(1))
FULL = {
    "column.weight": values(24, H, salt=2),
    "column.bias": values(24, salt=3),
    "row.weight": values(H, FFN, salt=4),
    "row.bias": values(H, salt=5),
    "up.weight": values(FFN, H, salt=6),
    "up.bias": values(FFN, salt=7),
    "embedding.weight": values(V, H, salt=8),
}
INPUT, WIDE_INPUT = values(B, S, H, salt=9), values(B, S, FFN, salt=10)
LOSS_WEIGHT = values(B, S, salt=16).relu()
"""Half of the tokens are masked."""
SIZES = (12, 8, 4)
"""The fused outputs of the column-parallel layer."""


def loss_of(y: Tensor, weight: Tensor) -> Tensor:
    """A scalar of which every rank computes the part that its slice of an output stands for."""
    return (y * y * weight).sum()


# --- what ranks run ---------------------------------------------------------------------------------------------------


def probe(cases: list[Case]) -> list[dict[str, dict[str, Tensor]]]:
    return [_probe(case) for case in cases]


def _probe(case: Case) -> dict[str, dict[str, Tensor]]:
    from megalm.core.embedding import VocabParallelEmbedding
    from megalm.core.linear import ColumnParallelLinear, RowParallelLinear, postpone_weight_gradients
    from megalm.core.loss import output_loss, output_metrics
    from megalm.core.tensor_parallel import TensorParallel
    from megalm.core.weight_gradients import WeightGradients
    from megalm.mesh.groups import ALONE, ParallelContext
    from megalm.mesh.topology import Topology

    group = ALONE if case.tp == 1 else ParallelContext.create(Topology(tp=case.tp, dp=4 // case.tp)).tp_group
    weight_gradients = WeightGradients()
    tp = TensorParallel(group, case.sequence_parallel, case.parts)

    def outside(x: Tensor) -> Tensor:
        """What a rank has of an activation outside tensor-parallel regions."""
        return x.chunk(group.size, 1)[group.index] if tp.splits_sequence else x

    def own_columns(y: Tensor) -> Tensor:
        parts = [part.chunk(group.size, -1)[group.index] for part in y.split(SIZES, -1)]
        return torch.cat(parts, -1)

    def fill(module: nn.Module, name: str) -> None:
        module.double()
        for parameter, declaration in module.declarations.items():
            getattr(module, parameter).data.copy_(declaration.shard.take(FULL[f"{name}.{parameter}"]))

    def run(name: str, modules: dict[str, nn.Module], function, x: Tensor | None, weight: Tensor) -> None:
        """Forward and backward; with zero bubble the weights' gradients come from what was postponed."""
        for module_name, module in modules.items():
            fill(module, module_name)
            if case.zero_bubble:
                postpone_weight_gradients(module, weight_gradients)
        x = None if x is None else x.clone().requires_grad_()
        y = function(x)
        loss = loss_of(y, weight)
        if case.zero_bubble:
            with weight_gradients.record(name):
                loss.backward()
            for module in modules.values():
                if not isinstance(module, VocabParallelEmbedding):
                    assert module.weight.grad is None, "left for later"
            for parameter, gradient in weight_gradients.compute(name):
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        else:
            loss.backward()
        found = {"output": y.detach()} | ({} if x is None else {"input": x.grad})
        for module_name, module in modules.items():
            for parameter, declaration in module.declarations.items():
                full = torch.zeros(declaration.shard.full_shape, dtype=torch.float64)
                declaration.shard.put(getattr(module, parameter).grad, full)
                # Slices and parts add up to the gradient; replicas that see all of it must not be counted twice.
                if not declaration.shard.is_sharded and not declaration.record.partial_over:
                    full /= group.size
                found[f"{module_name}.{parameter}"] = full
        results[name] = found

    results: dict[str, dict[str, Tensor]] = {}
    column = ColumnParallelLinear(H, SIZES, tensor_parallel=tp, std=1.0, bias=True)
    run("column", {"column": column}, column, outside(INPUT), own_columns(values(B, S, 24, salt=11)))

    row = RowParallelLinear(FFN, H, tensor_parallel=tp, std=1.0, bias=True)
    wide = WIDE_INPUT.chunk(group.size, -1)[group.index]
    run("row", {"row": row}, row, wide, outside(values(B, S, H, salt=12)))

    up, down = (
        ColumnParallelLinear(H, (FFN,), tensor_parallel=tp, std=1.0, bias=True),
        RowParallelLinear(FFN, H, tensor_parallel=tp, std=1.0, bias=False),
    )
    FULL["down.weight"] = FULL["row.weight"]
    pair = {"up": up, "down": down}
    run("pair", pair, lambda x: down(F.gelu(up(x))), outside(INPUT), outside(values(B, S, H, salt=13)))

    embedding = VocabParallelEmbedding(V, H, tensor_parallel=tp, std=1.0)
    run("lookup", {"embedding": embedding}, lambda _: embedding(TOKENS), None, outside(values(B, S, H, salt=14)))

    head = VocabParallelEmbedding(V, H, tensor_parallel=tp, std=1.0)
    weight = values(B, S, V, salt=15)[..., head.first_token : head.stop_token]
    run("logits", {"embedding": head}, lambda x: head.logits(x)[..., : head.local_vocab_size], outside(INPUT), weight)

    chunks = (0, 2, 5, 8, 64)  # 5 and 8 leave a shorter last chunk; 64 is more than there are
    for chunk_tokens in chunks if not case.zero_bubble else ():
        for z_loss in (0.0, 0.2):
            rows = VocabParallelEmbedding(V, H, tensor_parallel=tp, std=1.0)
            fill(rows, "embedding")
            x = outside(INPUT).clone().requires_grad_()
            arguments = rows, TOKENS, LOSS_WEIGHT
            terms = output_loss(x, *arguments, chunk_tokens=chunk_tokens, z_loss=z_loss)
            (3.0 * terms.sum()).backward()
            full = torch.zeros_like(FULL["embedding.weight"])
            rows.declarations["weight"].shard.put(rows.weight.grad, full)
            assert not rows.weight.grad[rows.local_vocab_size :].any(), "padding is never trained"
            with torch.no_grad():
                torch.testing.assert_close(output_loss(x, *arguments, chunk_tokens=3, z_loss=z_loss), terms)
            results[f"loss {chunk_tokens} {z_loss}"] = {
                "output": terms.detach(),
                "input": x.grad,
                "embedding.weight": full,
            }
        metrics = output_metrics(outside(INPUT), rows, _half_right(), LOSS_WEIGHT, chunk_tokens=chunk_tokens)
        results[f"metrics {chunk_tokens}"] = {"output": metrics}
    return results


# --- what they must have found ----------------------------------------------------------------------------------------


@cache
def expected(name: str) -> dict[str, Tensor]:
    full = {key: value.clone().requires_grad_() for key, value in FULL.items()}
    x = (WIDE_INPUT if name == "row" else INPUT).clone().requires_grad_()
    y, weight = {
        "column": lambda: (F.linear(x, full["column.weight"], full["column.bias"]), values(B, S, 24, salt=11)),
        "row": lambda: (F.linear(x, full["row.weight"], full["row.bias"]), values(B, S, H, salt=12)),
        "pair": lambda: (
            F.linear(F.gelu(F.linear(x, full["up.weight"], full["up.bias"])), full["row.weight"]),
            values(B, S, H, salt=13),
        ),
        "lookup": lambda: (F.embedding(TOKENS, full["embedding.weight"]), values(B, S, H, salt=14)),
        "logits": lambda: (F.linear(x, full["embedding.weight"]), values(B, S, V, salt=15)),
    }[name]()
    loss_of(y, weight).backward()
    gradients = {key: value.grad for key, value in full.items() if value.grad is not None}
    if name == "pair":
        gradients["down.weight"] = gradients.pop("row.weight")
    return {"output": y.detach(), "input": x.grad} | gradients


@pytest.fixture(scope="module")
def results() -> dict[Case, list[dict[str, dict[str, Tensor]]]]:
    """By case: what each of the ranks of one tensor-parallel group found."""
    per_rank = run_ranks(4, probe, CASES)
    return {case: [found[i] for found in per_rank][: case.tp] for i, case in enumerate(CASES)}


def joined(parts: list[Tensor], dim: int | None) -> Tensor:
    """The whole from shares along ``dim``, or from copies that must agree to the last bit."""
    if dim is None:
        assert all(torch.equal(part, parts[0]) for part in parts)
        return parts[0]
    return torch.cat(parts, dim)


@pytest.mark.parametrize("name", ["column", "row", "pair", "lookup", "logits"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_layer_matches_one_process(case: Case, name: str, results) -> None:
    ranks, want = [found[name] for found in results[case]], expected(name)
    outside = 1 if case.sequence_parallel else None
    output_dim = -1 if name in ("column", "logits") else outside
    outputs = [found["output"] for found in ranks]
    if name == "column":  # every rank has its share of each of the fused outputs
        sizes = [size // case.tp for size in SIZES]
        outputs = [torch.cat(parts, -1) for parts in zip(*(y.split(sizes, -1) for y in outputs), strict=True)]
    torch.testing.assert_close(joined(outputs, output_dim), want["output"])
    if name != "lookup":
        inputs = [found["input"] for found in ranks]
        torch.testing.assert_close(joined(inputs, -1 if name == "row" else outside), want["input"])
    for parameter in ranks[0].keys() - {"output", "input"}:
        total = torch.stack([found[parameter] for found in ranks]).sum(0)
        torch.testing.assert_close(total, want[parameter], msg=lambda m, p=parameter: f"{p}: {m}")


@pytest.mark.parametrize("case", [case for case in CASES if case.parts > 1], ids=str)
def test_parts_change_nothing_but_the_last_bits(case: Case, results) -> None:
    """A ring adds the ranks' parts of an element in an order that depends on where it lies in the buffer."""
    whole = results[replace(case, parts=1)]
    for name in ("column", "row", "pair"):
        for found, want in zip(results[case], whole, strict=True):
            assert found[name].keys() == want[name].keys()
            for key, value in want[name].items():
                torch.testing.assert_close(found[name][key], value, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("z_loss", [0.0, 0.2])
@pytest.mark.parametrize("case", [case for case in CASES if not case.zero_bubble], ids=str)
def test_output_loss_matches_one_process(case: Case, z_loss: float, results) -> None:
    x, rows = INPUT.clone().requires_grad_(), FULL["embedding.weight"].clone().requires_grad_()
    logits = F.linear(x, rows).flatten(0, 1)
    losses = F.cross_entropy(logits, TOKENS.flatten(), reduction="none")
    terms = [(losses * LOSS_WEIGHT.flatten()).sum()]
    if z_loss:
        terms.append(z_loss * (logits.logsumexp(-1).square() * LOSS_WEIGHT.flatten()).sum())
    want = torch.stack(terms)
    (3.0 * want.sum()).backward()
    names = [name for name in results[case][0] if name.startswith("loss") and name.endswith(str(z_loss))]
    assert len(names) == 5
    for name in names:
        ranks = [found[name] for found in results[case]]
        torch.testing.assert_close(joined([found["output"] for found in ranks], None), want)
        gradient = joined([found["input"] for found in ranks], 1 if case.sequence_parallel else None)
        torch.testing.assert_close(gradient, x.grad)
        torch.testing.assert_close(sum(found["embedding.weight"] for found in ranks), rows.grad)


@pytest.mark.parametrize("case", [case for case in CASES if not case.zero_bubble], ids=str)
def test_an_evaluation_counts_what_one_process_counts(case: Case, results) -> None:
    logits, labels = F.linear(INPUT, FULL["embedding.weight"]), _half_right()
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    right = (logits.argmax(-1) == labels).to(LOSS_WEIGHT.dtype)
    want = torch.stack([(losses * LOSS_WEIGHT.flatten()).sum(), (right * LOSS_WEIGHT).sum()])
    assert 0 < want[1] < LOSS_WEIGHT.sum()
    names = [name for name in results[case][0] if name.startswith("metrics")]
    assert len(names) == 5
    for name in names:
        for found in results[case]:
            torch.testing.assert_close(found[name]["output"], want, check_dtype=False)


def _half_right() -> Tensor:
    """[B, S] labels: what the model holds most likely at every other place."""
    likely = F.linear(INPUT, FULL["embedding.weight"]).argmax(-1)
    return torch.where(torch.arange(S) % 2 == 0, likely, TOKENS)


# --- memory and order -------------------------------------------------------------------------------------------------


def trace() -> dict[str, list]:
    """On 2 ranks: what layers save for backward, and the order of products, collectives and waits."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from megalm.core.collectives import Pending
    from megalm.core.embedding import VocabParallelEmbedding
    from megalm.core.linear import ColumnParallelLinear, RowParallelLinear, postpone_weight_gradients
    from megalm.core.loss import output_loss
    from megalm.core.tensor_parallel import TensorParallel
    from megalm.core.weight_gradients import WeightGradients
    from megalm.mesh.groups import ParallelContext
    from megalm.mesh.topology import Topology

    context = ParallelContext.create(Topology(tp=2))
    log: list[str] = []
    short = {
        "mm": "product",
        "addmm": "product",
        "addmm_": "product",
        "allreduce_": "reduce",
        "_allgather_base_": "gather",
        "_reduce_scatter_base_": "scatter",
    }

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            if name in short:
                log.append(short[name])
            return func(*args, **(kwargs or {}))

    wait = Pending.wait

    def logged_wait(self: Pending) -> Tensor:
        log.append("wait")
        return wait(self)

    Pending.wait = logged_wait  # type: ignore[method-assign]
    found: dict[str, list] = {}
    for sequence_parallel in (False, True):
        for zero_bubble, parts in ((False, 1), (True, 1), (False, 2), (True, 2)):
            tp, store = TensorParallel(context.tp_group, sequence_parallel, parts), WeightGradients()
            name = ("sp" if sequence_parallel else "whole") + ("·zb" if zero_bubble else "") + "·parts" * (parts > 1)
            column = ColumnParallelLinear(H, (FFN,), tensor_parallel=tp, std=1.0, bias=True)
            row = RowParallelLinear(FFN, H, tensor_parallel=tp, std=1.0, bias=True)
            if zero_bubble:
                postpone_weight_gradients(nn.ModuleList([column, row]), store)
            parameters = {p.data_ptr() for layer in (column, row) for p in layer.parameters()}
            saved: list[tuple[int, ...]] = []

            def pack(tensor: Tensor, saved=saved, parameters=parameters) -> Tensor:
                if tensor.data_ptr() not in parameters:
                    saved.append(tuple(tensor.shape))
                return tensor

            x = torch.randn(B, S // 2 if sequence_parallel else S, H, requires_grad=True)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), Log():
                middle = column(x)
                y = row(middle)
                found[f"{name} saved"] = list(saved)
                found[f"{name} forward"] = log.copy()
                log.clear()
                if zero_bubble:
                    with store.record(0):
                        y.backward(torch.ones_like(y))
                else:
                    y.backward(torch.ones_like(y))
                found[f"{name} backward"] = log.copy()
                log.clear()
                if zero_bubble:
                    list(store.compute(0))
                    found[f"{name} later"] = log.copy()
                    log.clear()
        rows = VocabParallelEmbedding(V, H, tensor_parallel=tp, std=1.0)
        weight = torch.ones(B, S)
        with Log():
            output_loss(x, rows, TOKENS, weight, chunk_tokens=B * S // 2)
        found[f"{'sp' if sequence_parallel else 'whole'} loss"] = log.copy()
        log.clear()
    return found


@pytest.fixture(scope="module")
def traced() -> dict[str, list]:
    first, second = run_ranks(2, trace)
    assert first == second, "ranks enter collectives in the same order"
    return first


def test_column_parallel_input_is_saved_as_the_rank_holds_it(traced) -> None:
    assert traced["whole saved"] == [(B, S, H), (B, S, FFN // 2)]
    assert traced["sp saved"] == [(B, S // 2, H), (B, S, FFN // 2)], "the share, not what was gathered of it"


def test_backward_hides_collectives_behind_products(traced) -> None:
    # Row-parallel first, then column-parallel; a wait that follows its collective at once hides nothing.
    assert traced["whole backward"] == ["product", "product", "product", "reduce", "product", "wait"]
    row = ["gather", "wait", "product", "product"]
    column = ["gather", "product", "scatter", "wait", "product", "wait"]
    assert traced["sp backward"] == row + column


def test_postponed_products_gather_ahead(traced) -> None:
    assert traced["whole·zb backward"] == ["product", "product", "reduce", "wait"]
    assert traced["whole·zb later"] == ["product", "product"]
    assert traced["sp·zb backward"] == ["gather", "wait", "product", "product", "scatter", "wait"]
    assert traced["sp·zb later"] == ["gather", "gather", "wait", "product", "wait", "product"]


def test_in_parts_every_collective_but_one_part_hides_behind_a_product(traced) -> None:
    apart = ["product", "reduce", "product", "reduce", "wait", "wait"]
    assert traced["whole forward"] == ["product", "product", "reduce", "wait"]
    assert traced["whole·parts forward"] == ["product", *apart]
    assert traced["whole·parts backward"] == traced["whole backward"], "there the weight gradient's product hides it"
    assert traced["whole·zb·parts backward"] == ["product", *apart]

    gathered = ["gather", "gather", "wait", "product", "wait", "product"]
    scattered = ["product", "scatter", "product", "scatter", "wait", "wait"]
    assert traced["sp forward"] == ["gather", "wait", "product", "product", "scatter", "wait"]
    assert traced["sp·parts forward"] == gathered + scattered
    column = ["gather", "product", "scatter", "wait", "product", "wait"]
    assert traced["sp·parts backward"] == [*gathered, "product", *column]
    assert traced["sp·zb·parts backward"] == gathered + scattered
    assert traced["sp·zb·parts later"] == traced["sp·zb later"]
    for name in ("whole", "sp"):
        assert traced[f"{name}·parts saved"] == traced[f"{name} saved"]


def test_output_loss_hides_gathers_and_reductions_behind_the_next_chunk(traced) -> None:
    statistics = ["gather", "wait"]  # two numbers per token, which the gradient cannot do without
    without_waits = [entry for entry in traced["whole loss"] if entry != "wait"]
    assert without_waits == ["product", "gather", "product", "reduce", "product"] * 2
    assert traced["sp loss"] == [
        *("gather", "wait", "gather"),  # the first chunk's inputs; the second's are on their way from here on
        *("product", *statistics, "product", "scatter", "product"),
        "wait",  # for the second chunk's inputs
        *("product", *statistics, "product"),
        "wait",  # for the first chunk's input gradients, issued three products ago
        *("scatter", "product", "wait"),
    ]
