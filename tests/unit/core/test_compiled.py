"""What torch.compile makes of a block: graphs, breaks, and kernels. Inductor on the CPU fuses as it does on GPUs."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megalm.config.schema import Engine, Model
from megalm.core.attention.context_parallel import ContextParallel
from megalm.core.dropout import Dropout
from megalm.core.norm import LayerNorm, RMSNorm
from megalm.core.output_chunks import _statistics, _to_gradient
from megalm.core.place import Place
from megalm.core.position import RotaryPosition
from megalm.core.tensor_parallel import TensorParallel
from megalm.models.transformer import Part, Transformer, build_full_model
from tests.families import bert_of

GPT2 = Model(num_layers=2, hidden_size=32, num_heads=4, sequence_length=160, vocab_size=61)
LLAMA = replace(
    GPT2, position="rotary", norm="rmsnorm", activation="swiglu", bias=False, num_kv_heads=2, tie_embeddings=False
)
MODELS = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "qwen3": replace(LLAMA, qk_norm=True),
    "bert": bert_of(GPT2),
    "dropout": replace(GPT2, dropout=0.1),
    "attention dropout": replace(GPT2, attention_dropout=0.1),
    "windows": replace(GPT2, attention_windows=(5,)),
}
PLACE = Place(torch.arange(160), torch.arange(2))


@pytest.mark.parametrize("name", MODELS)
def test_a_block_on_one_tensor_parallel_rank_is_one_graph(name: str) -> None:
    block = build_full_model(MODELS[name], 61).train().blocks["0"]
    torch._dynamo.reset()
    found = torch._dynamo.explain(block)(torch.randn(2, 160, 32, requires_grad=True), PLACE)
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons


# --- windows by flex attention ----------------------------------------------------------------------------------------


def make(model: Model, attention: str) -> Transformer:
    from megalm.core.random import initialise

    made = Transformer(
        model,
        61,
        part=Part({0: range(model.num_layers)}, 1),
        tensor_parallel=TensorParallel(),
        context_parallel=ContextParallel(),
        engine=Engine(attention=attention),
        objective=None,
        seed=0,
        device=torch.device("cpu"),
    )
    initialise(made.tensors(), 5)
    return made


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("compiles", [False, True])
def test_windows_by_block_masks_give_the_same(causal: bool, compiles: bool, monkeypatch) -> None:
    """The path of GPUs, forward; their masks are made once and serve every layer of a window."""
    model = replace(MODELS["windows"], attention_windows=(0, 9, 130), num_layers=6, causal=causal)
    tokens = torch.randint(0, 61, (2, 160), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = make(model, "auto")(tokens)
        monkeypatch.setattr("megalm.models.transformer.device_kind", lambda _: "cuda")
        fused = make(model, "fused")
        if compiles:
            torch._dynamo.reset()
            counter = torch._dynamo.testing.CompileCounter()
            for block in fused.blocks.values():
                block.compile(backend=counter, dynamic=False)
        calls = []
        flex = torch.nn.attention.flex_attention.flex_attention
        if not compiles:
            monkeypatch.setattr(
                torch.nn.attention.flex_attention,
                "flex_attention",
                lambda *a, **k: (calls.append(k["block_mask"]), flex(*a, **k))[1],
            )
        for _ in range(2):
            torch.testing.assert_close(fused(tokens), want, atol=1e-6, rtol=1e-5)
    if compiles:
        assert counter.frame_count == 3, "a graph for full attention, and one for each window"
    else:
        assert len(calls) == 8
        assert len({id(mask) for mask in calls}) == 2


# --- kernels ----------------------------------------------------------------------------------------------------------


def kernels_of(function: Callable[..., Any], *arguments: Any) -> list[int]:
    """Kernels that inductor makes of a function, and of its backward."""
    from torch._inductor.utils import run_and_get_code

    def step() -> None:
        made = torch.compile(function, dynamic=False)(*arguments)
        if isinstance(made, Tensor) and made.requires_grad:
            made.sum().backward()

    torch._dynamo.reset()
    _, codes = run_and_get_code(step)
    assert not any("extern_kernels." in code for code in codes)
    return [len(re.findall(r"async_compile\.cpp", code)) for code in codes]


def ones(norm: LayerNorm | RMSNorm) -> LayerNorm | RMSNorm:
    torch.nn.init.ones_(norm.weight)
    return norm


def activation(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


ROTARY = RotaryPosition(replace(LLAMA, hidden_size=64), device=torch.device("cpu"))
NORM = ones(LayerNorm(64, epsilon=1e-5, bias=True))
DROPOUT = Dropout(0.1, seed=1, layer=0, site="mlp")

PARTS: dict[str, tuple[Callable[..., Any], tuple[Any, ...], int]] = {
    "rotary": (lambda x: ROTARY(x, PLACE.positions), (activation(2, 4, 160, 16),), 2),
    "layernorm": (NORM, (activation(2, 160, 64),), 2),
    "rmsnorm": (ones(RMSNorm(64, epsilon=1e-5)), (activation(2, 160, 64),), 2),
    "gelu": (lambda x: F.gelu(x, approximate="tanh"), (activation(2, 160, 64),), 2),
    "swiglu": (lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1], (activation(2, 160, 64),), 2),
    "residual, dropout and norm": (
        lambda x, y: NORM(x + DROPOUT(y, PLACE, PLACE.positions)),
        (activation(2, 160, 64), activation(2, 160, 64)),
        2,
    ),
    "statistics of the loss": (
        _statistics,
        (torch.randn(32, 128), torch.randint(0, 128, (32, 1)), torch.ones(32, 1, dtype=torch.bool)),
        1,
    ),
    "gradient of the loss": (
        _to_gradient,
        (
            torch.randn(32, 128),
            torch.randint(0, 128, (32, 1)),
            torch.ones(32, 1, dtype=torch.bool),
            torch.full((32, 1), 5.0),
            torch.rand(32, 1),
            0.1,
        ),
        1,
    ),
}


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="no C++ compiler")
@pytest.mark.parametrize("name", PARTS)
def test_each_part_is_one_fused_kernel_in_forward_and_one_in_backward(name: str) -> None:
    function, arguments, graphs = PARTS[name]
    assert kernels_of(function, *arguments) == [1] * graphs
