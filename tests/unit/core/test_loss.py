"""The chunked output loss against ``F.cross_entropy`` on whole logits, and what it promises about memory and dtype.

The same over tensor-parallel ranks: tests/dist/test_tensor_parallel.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megalm.core.embedding import VocabParallelEmbedding
from megalm.core.loss import output_loss, sequence_log_probabilities
from megalm.core.tensor_parallel import TensorParallel

B, S, H, V = 3, 10, 8, 37


def head(dtype: torch.dtype, vocab_size: int = V, hidden_size: int = H) -> VocabParallelEmbedding:
    embedding = VocabParallelEmbedding(vocab_size, hidden_size, tensor_parallel=TensorParallel(), std=1.0)
    with torch.no_grad():
        embedding.weight.copy_(torch.randn(vocab_size, hidden_size, generator=torch.Generator().manual_seed(0)))
    return embedding.to(dtype)


def batch(dtype: torch.dtype, hidden_size: int = H) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden vectors, labels, and factors of which a fifth is zero, as a loss mask makes them."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(B, S, hidden_size, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (B, S), generator=generator)
    weight = torch.rand(B, S, generator=generator) * (torch.rand(B, S, generator=generator) < 0.8)
    return x, labels, weight


def whole(x: Tensor, rows: Tensor, labels: Tensor, weight: Tensor, z_loss: float) -> Tensor:
    """The same terms, written out on all logits."""
    logits = F.linear(x, rows).flatten(0, 1)
    weight = weight.flatten().to(logits.dtype)
    losses = (F.cross_entropy(logits, labels.flatten(), reduction="none") * weight).sum()
    terms = [losses]
    if z_loss:
        terms.append(z_loss * (weight * logits.logsumexp(-1).square()).sum())
    return torch.stack(terms)


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize("chunk_tokens", [0, 1, 7, 30, 100])
def test_terms_and_gradients_of_any_chunk_size(chunk_tokens: int, z_loss: float) -> None:
    embedding, (x, labels, weight) = head(torch.float64), batch(torch.float64)
    terms = output_loss(x, embedding, labels, weight, chunk_tokens=chunk_tokens, z_loss=z_loss)
    (2.5 * terms.sum()).backward()
    want_x, want_rows = x.detach().clone().requires_grad_(), embedding.weight.detach().clone().requires_grad_()
    want = whole(want_x, want_rows, labels, weight, z_loss)
    (2.5 * want.sum()).backward()
    torch.testing.assert_close(terms, want)
    torch.testing.assert_close(x.grad, want_x.grad)
    torch.testing.assert_close(embedding.weight.grad, want_rows.grad)
    assert bool((x.grad[weight == 0] == 0).all()), "masked tokens teach nothing"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_functions_that_are_compiled_compute_the_same(z_loss: float, dtype: torch.dtype, monkeypatch) -> None:
    """Without the compiler; with padding that is multiplied, as on GPUs."""
    monkeypatch.setattr("megalm.core.output_chunks.compiled", lambda function: function)
    monkeypatch.setattr("megalm.core.embedding.device_kind", lambda _: "cuda")
    found = []
    for compiles in (False, True):
        embedding = VocabParallelEmbedding(V, H, tensor_parallel=TensorParallel(), std=1.0, pad_multiple=64)
        with torch.no_grad():
            embedding.weight[:V].copy_(head(torch.float32).weight)
        embedding.to(dtype)
        x, labels, weight = batch(dtype)
        terms = output_loss(x, embedding, labels, weight, chunk_tokens=7, z_loss=z_loss, compiles=compiles)
        (2.5 * terms.sum()).backward()
        assert not embedding.weight.grad[V:].any()
        found.append((terms.detach(), x.grad, embedding.weight.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk_tokens", [0, 7])
def test_padding_rows_take_no_part(chunk_tokens: int, dtype: torch.dtype, monkeypatch) -> None:
    """On the CPU they are not multiplied; where they are, they are masked: no probability, no gradient."""
    found = []
    for rows, kind in ((V, "cpu"), (64, "cpu"), (64, "cuda")):
        monkeypatch.setattr("megalm.core.embedding.device_kind", lambda _, kind=kind: kind)
        embedding = VocabParallelEmbedding(V, H, tensor_parallel=TensorParallel(), std=1.0, pad_multiple=rows)
        with torch.no_grad():
            embedding.weight[:V].copy_(head(torch.float32).weight)
        embedding.to(dtype)
        x, labels, weight = batch(dtype)
        bias = torch.zeros(rows, dtype=dtype).requires_grad_()
        terms = output_loss(x, embedding, labels, weight, chunk_tokens=chunk_tokens, z_loss=0.3, bias=bias)
        (2.5 * terms.sum()).backward()
        assert embedding.weight.shape == (rows, H)
        assert not embedding.weight.grad[V:].any()
        assert not bias.grad[V:].any()
        found.append((terms.detach(), x.grad, embedding.weight.grad[:V], bias.grad[:V]))
    plain, left_out, masked = found
    for one, other in zip(plain, left_out, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(plain, masked, strict=True):
        torch.testing.assert_close(one, other)


def test_one_gradient_for_all_terms_or_an_error() -> None:
    embedding, (x, labels, weight) = head(torch.float64), batch(torch.float64)
    terms = output_loss(x, embedding, labels, weight, chunk_tokens=7, z_loss=0.1)
    with pytest.raises(RuntimeError, match="terms of the loss are minimised together"):
        terms[0].backward()


def test_blocks_of_the_softmax_leave_no_seam(monkeypatch) -> None:
    embedding, (x, labels, weight) = head(torch.float64), batch(torch.float64)
    want = output_loss(x, embedding, labels, weight, chunk_tokens=0)
    monkeypatch.setattr("megalm.core.output_chunks.CPU_BLOCK", 1)
    monkeypatch.setattr("megalm.core.output_chunks.CPU_BLOCK_ROWS", 4)
    torch.testing.assert_close(output_loss(x, embedding, labels, weight, chunk_tokens=0), want)


def test_evaluation_gives_the_same_losses_and_computes_no_gradient() -> None:
    embedding, (x, labels, weight) = head(torch.float32), batch(torch.float32)
    products: list[str] = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_):
                products.append(str(func))
            return func(*args, **(kwargs or {}))

    want = output_loss(x, embedding, labels, weight, chunk_tokens=10)
    with torch.no_grad(), Count():
        terms = output_loss(x, embedding, labels, weight, chunk_tokens=10)
    assert not terms.requires_grad
    torch.testing.assert_close(terms, want)
    assert len(products) == 3, "one product for the logits of each of three chunks"


def test_extreme_logits_stay_finite() -> None:
    embedding, (x, labels, weight) = head(torch.float32), batch(torch.float32)
    with torch.no_grad():
        x *= 1e4
    terms = output_loss(x, embedding, labels, weight, chunk_tokens=7, z_loss=1e-6)
    terms.sum().backward()
    want = whole(x.detach(), embedding.weight.detach(), labels, weight, 1e-6)
    torch.testing.assert_close(terms, want)
    assert bool(x.grad.isfinite().all() and embedding.weight.grad.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_its_rounding(dtype: torch.dtype) -> None:
    """Factors of 1e-7, as of a global batch of ten million tokens, times the loss scale that fp16 needs."""
    embedding, (x, labels, weight) = head(dtype), batch(dtype)
    weight, loss_scale = weight * 1e-7, 65536.0 * 16
    terms = output_loss(x, embedding, labels, weight, chunk_tokens=8)
    (terms * loss_scale).sum().backward()
    want_x, want_rows = x.detach().float().requires_grad_(), embedding.weight.detach().float().requires_grad_()
    want = whole(want_x, want_rows, labels, weight, 0.0)
    (want * loss_scale).sum().backward()
    torch.testing.assert_close(terms, want.detach(), rtol=2e-2 if dtype == torch.bfloat16 else 3e-3, atol=0.0)
    for got, exact in ((x.grad, want_x.grad), (embedding.weight.grad, want_rows.grad)):
        assert got.dtype == dtype
        error = (got.float() - exact).norm() / exact.norm()
        assert error < (1e-2 if dtype == torch.bfloat16 else 1e-3)


def test_weight_gradient_of_many_chunks_is_added_in_fp32() -> None:
    """A hundred chunks of the same token: added in bf16, contributions below 1/256 of the sum would be lost."""
    embedding = head(torch.bfloat16)
    x = torch.ones(1, 400, H, dtype=torch.bfloat16, requires_grad=True)
    labels, weight = torch.zeros(1, 400, dtype=torch.int64), torch.full((1, 400), 1.0)
    output_loss(x, embedding, labels, weight, chunk_tokens=1).sum().backward()
    many = embedding.weight.grad.clone()
    embedding.weight.grad = None
    output_loss(x, embedding, labels, weight, chunk_tokens=0).sum().backward()
    torch.testing.assert_close(many, embedding.weight.grad, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_tensor_is_one_chunk_of_logits(dtype: torch.dtype) -> None:
    vocab_size, hidden_size, chunk_tokens = 2048, 4, 6
    embedding, (x, labels, weight) = head(dtype, vocab_size, hidden_size), batch(dtype, hidden_size)
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            tensors = result if isinstance(result, (tuple, list)) else (result,)
            largest = max([largest, *(t.numel() for t in tensors if isinstance(t, Tensor))])
            return result

    kept = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), Largest():
        terms = output_loss(x, embedding, labels, weight, chunk_tokens=chunk_tokens)
        terms.sum().backward()
    assert largest == chunk_tokens * vocab_size, f"of {B * S * vocab_size} logits"
    assert kept == x.numel() + embedding.weight.numel(), "what is kept for backward are the two gradients"


@pytest.mark.parametrize("chunk_tokens", [0, 1, 7, 30])
def test_log_probabilities_of_rows_and_any_function_of_them(chunk_tokens: int) -> None:
    embedding, (x, labels, weight) = head(torch.float64), batch(torch.float64)
    bias = torch.randn(V, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    mask = (weight > 0).double()
    rows = sequence_log_probabilities(x, embedding, labels, mask, chunk_tokens=chunk_tokens, bias=bias)
    torch.nn.functional.logsigmoid(rows[0] - 2.0 * rows[1] + rows[2]).backward()
    inputs = [t.detach().clone().requires_grad_() for t in (x, embedding.weight, bias)]
    logits = F.linear(*inputs)
    want = -(F.cross_entropy(logits.mT, labels, reduction="none") * mask).sum(dim=1)
    torch.nn.functional.logsigmoid(want[0] - 2.0 * want[1] + want[2]).backward()
    torch.testing.assert_close(rows, want)
    for ours, theirs in zip((x, embedding.weight, bias), inputs, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_log_probabilities_in_half_precision_follow_those_in_full() -> None:
    embedding, (x, labels, weight) = head(torch.float32), batch(torch.float32)
    half, half_x = head(torch.float16), x.detach().half().requires_grad_()
    mask = (weight > 0).float()
    for module, inputs in ((embedding, x), (half, half_x)):
        sums = sequence_log_probabilities(inputs, module, labels, mask, chunk_tokens=7)
        assert sums.dtype == torch.float32
        (1024.0 * sums[0] - 512.0 * sums[2]).backward()
    torch.testing.assert_close(half_x.grad.float(), x.grad, rtol=0.02, atol=8.0)
    torch.testing.assert_close(half.weight.grad.float(), embedding.weight.grad, rtol=0.02, atol=8.0)
    assert bool((x.grad[1] == 0).all()), "a row without a factor teaches nothing"
