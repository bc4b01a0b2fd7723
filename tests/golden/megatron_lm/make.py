"""Writes this folder's checkpoints with Megatron-Core's own model, and what it computes. Not a test.

Environment: Python 3.11, torch 2.13.0 (CPU), megatron-core 0.16.1, numpy. Run in this folder:

    python make.py                    writes every case below, and expected.npz
    python make.py FOLDER OUT.npz     loads a checkpoint that another tool wrote, strictly, and saves its logits

Models, names, shapes and slices are Megatron-Core's; ranks are processes that talk over gloo. The files around them
(folders, keys, ``args``) are laid out as Megatron-LM's ``megatron/training/checkpointing.py`` does, which the package
does not contain. Megatron-Core asks for a GPU in a few places; ``pretend`` answers for it.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import sys
import zlib
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from megatron.core import parallel_state, tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional as F

HERE = Path(__file__).parent
VOCAB, LENGTH = 118, 16
TOKENS = [3, 117, 17, 0, 101, 56, 7, 90]

GPT2 = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "group_query_attention": False,
    "num_query_groups": 1,
    "ffn_hidden_size": 64,
    "normalization": "LayerNorm",
    "add_bias_linear": True,
    "add_qkv_bias": False,
    "swiglu": False,
    "bias_gelu_fusion": True,
    "qk_layernorm": False,
    "position_embedding_type": "learned_absolute",
    "rotary_percent": 1.0,
    "rotary_base": 10000,
    "use_rope_scaling": False,
    "rope_scaling_factor": 8.0,
    "untie_embeddings_and_output_weights": False,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
}
LLAMA = GPT2 | {
    "num_layers": 4,
    "group_query_attention": True,
    "num_query_groups": 2,
    "ffn_hidden_size": 48,
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "swiglu": True,
    "bias_gelu_fusion": False,
    "qk_layernorm": True,
    "position_embedding_type": "rope",
    "rotary_percent": 0.5,
    "rotary_base": 5000,
    "use_rope_scaling": True,
    "untie_embeddings_and_output_weights": True,
}
CASES = {
    "gpt2_tp1": GPT2,
    "gpt2_tp2_pp2_vp2": GPT2
    | {
        "num_layers": 4,
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": 2,
    },
    "llama_tp2_pp2": LLAMA | {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    "llama_tp4": LLAMA | {"num_layers": 1, "tensor_model_parallel_size": 4},
}


def arguments(case: dict[str, object]) -> Namespace:
    """What Megatron-LM would have in ``args``, as far as the architecture goes, and a few of its odd values."""
    tp = case["tensor_model_parallel_size"]
    multiple = 16 * tp  # make_vocab_size_divisible_by × tp
    return Namespace(
        **case,
        seq_length=LENGTH,
        max_position_embeddings=LENGTH,
        kv_channels=8,
        vocab_size=VOCAB,
        padded_vocab_size=-(-VOCAB // multiple) * multiple,
        make_vocab_size_divisible_by=16,
        layernorm_epsilon=1e-5,
        norm_epsilon=1e-5,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=0.02,
        rotary_interleaved=False,
        num_experts=None,
        multi_latent_attention=False,
        apply_layernorm_1p=False,
        model_type=ModelType.encoder_or_decoder,
        attention_backend=AttnBackend.auto,
        params_dtype=torch.float32,
        consumed_train_samples=800,
    )


def pretend() -> None:
    """Answer what Megatron-Core asks of CUDA; nothing here has dropout, so there is no random state to fork."""
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.Tensor.cuda = lambda self, *_, **__: self
    tensor_parallel.get_cuda_rng_tracker().fork = lambda *_: contextlib.nullcontext()


def build(args: Namespace, chunk: int | None) -> GPTModel:
    """One chunk of this rank's layers."""
    config = TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups if args.group_query_attention else None,
        ffn_hidden_size=args.ffn_hidden_size,
        normalization=args.normalization,
        layernorm_epsilon=args.layernorm_epsilon,
        add_bias_linear=args.add_bias_linear,
        add_qkv_bias=args.add_qkv_bias,
        gated_linear_unit=args.swiglu,
        activation_func=F.silu if args.swiglu else F.gelu,
        bias_activation_fusion=args.bias_gelu_fusion,
        qk_layernorm=args.qk_layernorm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        params_dtype=torch.float32,
        pipeline_dtype=torch.float32,
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=args.virtual_pipeline_model_parallel_size,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(qk_layernorm=args.qk_layernorm, normalization=args.normalization),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=chunk),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=chunk),
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=args.rope_scaling_factor,
        parallel_output=False,
        vp_stage=chunk,
    ).eval()


def fill(model: GPTModel, chunk: int) -> None:
    """Values everywhere, biases and padding included: alike on the ranks that hold copies."""
    for name, parameter in model.named_parameters():
        place = (parallel_state.get_pipeline_model_parallel_rank(), chunk)
        key = f"{place}{name}"
        if name == "output_layer.weight" and model.share_embeddings_and_output_weights:
            key = "(0, 0)embedding.word_embeddings.weight"
        if getattr(parameter, "tensor_model_parallel", False):
            key += f" of {parallel_state.get_tensor_model_parallel_rank()}"
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data = centre + 0.2 * torch.randn(parameter.shape, generator=generator)


def logits(models: list[GPTModel], pp: int) -> torch.Tensor | None:
    """[S, V] on the ranks of the last stage; activations travel from stage to stage as a pipeline sends them."""
    tokens = torch.tensor([TOKENS])
    positions = torch.arange(len(TOKENS))[None]
    mask = torch.triu(torch.ones(1, 1, len(TOKENS), len(TOKENS)), 1).bool()
    rank = parallel_state.get_pipeline_model_parallel_rank()
    here, result = None, None
    for number in range(pp * len(models)):
        chunk, stage = divmod(number, pp)
        if rank != stage:
            continue
        if number:
            if pp > 1:
                here = torch.empty(len(TOKENS), 1, models[0].config.hidden_size)
                dist.recv(here, parallel_state.get_pipeline_model_parallel_prev_rank())
            models[chunk].set_input_tensor(here)
        here = models[chunk](tokens, positions, mask)
        if number == pp * len(models) - 1:
            result = here[0]
        elif pp > 1:
            dist.send(here.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
    return result


def file_of(folder: Path, args: Namespace, tp_rank: int, pp_rank: int) -> Path:
    suffix = f"_{pp_rank:03d}" if args.pipeline_model_parallel_size > 1 else ""
    return folder / f"mp_rank_{tp_rank:02d}{suffix}" / "model_optim_rng.pt"


def rank_main(rank: int, args: Namespace, folder: Path, load: bool, out: Path) -> None:
    tp, pp, vp = (
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.virtual_pipeline_model_parallel_size,
    )
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29631"}
    dist.init_process_group("gloo", rank=rank, world_size=tp * pp)
    parallel_state.initialize_model_parallel(tp, pp, virtual_pipeline_model_parallel_size=vp)
    pretend()
    models = [build(args, chunk if vp else None) for chunk in range(vp or 1)]
    path = file_of(
        folder, args, parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank()
    )
    names = [f"model{chunk}" for chunk in range(vp)] if vp else ["model"]
    if load:
        state = torch.load(path, weights_only=False)
        for name, model in zip(names, models, strict=True):
            model.load_state_dict(state[name], strict=True)
    else:
        for chunk, model in enumerate(models):
            fill(model, chunk)
        states = {name: model.state_dict_for_save_checkpoint() for name, model in zip(names, models, strict=True)}
        save(path, args, states)
    with torch.no_grad():
        result = logits(models, pp)
    if result is not None and parallel_state.get_tensor_model_parallel_rank() == 0:
        np.save(out, result.numpy())
    dist.barrier()
    dist.destroy_process_group()


def save(path: Path, args: Namespace, states: dict[str, object]) -> None:
    random_states = {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "rng_tracker_states": {},
    }
    path.parent.mkdir(parents=True)
    state = {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": 100,
        "num_floating_point_operations_so_far": 0,
        **states,
        "rerun_state_machine": None,
    }
    if path.parent.name in ("mp_rank_00", "mp_rank_00_000"):  # every rank's has one; one is enough here
        state["rng_state"] = [random_states]
    torch.save(state, path)


def run(args: Namespace, folder: Path, *, load: bool) -> np.ndarray:
    out = Path("/tmp") / f"megatron_logits_{os.getpid()}.npy"
    ranks = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    mp.spawn(rank_main, (args, folder, load, out), nprocs=ranks)
    result = np.load(out)
    out.unlink()
    return result


def make_all() -> None:
    expected = {"tokens": np.array(TOKENS)}
    for name, case in CASES.items():
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        expected[name] = run(arguments(case), folder / "iter_0000100", load=False)
        (folder / "latest_checkpointed_iteration.txt").write_text("100")
    np.savez_compressed(HERE / "expected.npz", **expected)


def check(folder: Path, out: Path) -> None:
    tracker = (folder / "latest_checkpointed_iteration.txt").read_text().strip()
    folder = folder / (tracker if tracker == "release" else f"iter_{int(tracker):07d}")
    first = sorted(folder.glob("mp_rank_00*/model_optim_rng.pt"))[0]
    args = torch.load(first, weights_only=False)["args"]
    np.savez(out, tokens=np.array(TOKENS), logits=run(args, folder, load=True))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        check(Path(sys.argv[1]), Path(sys.argv[2]))
    else:
        make_all()
