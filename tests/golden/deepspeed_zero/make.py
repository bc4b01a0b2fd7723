"""Writes this folder's checkpoints with DeepSpeed itself. Not a test, though megalm's own environment has all it needs.

Environment: Python 3.11, torch 2.13.0 (CPU), deepspeed 0.19.8, transformers 5.23.0, megalm. Run ``python make.py`` in
this folder. Two ranks talk over gloo, take two steps, and save:

    gpt2_zero1, gpt2_zero2, gpt2_zero3   transformers' GPT2LMHeadModel, with its config.json beside; fp32 or bf16
    megalm_zero1                         megalm's own GPT with config.yaml beside

``expected.npz`` holds the fp32 weights, as every rank sees them after DeepSpeed gathered them.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

HERE = Path(__file__).parent
RANKS, VOCAB, LENGTH, HIDDEN, LAYERS, HEADS = 2, 61, 8, 12, 2, 2
CASES = {"gpt2_zero1": (1, True), "gpt2_zero2": (2, False), "gpt2_zero3": (3, False), "megalm_zero1": (1, False)}
MEGALM = {
    "num_layers": LAYERS,
    "hidden_size": HIDDEN,
    "num_heads": HEADS,
    "vocab_size": VOCAB,
    "sequence_length": LENGTH,
    "norm": "rmsnorm",
    "activation": "swiglu",
    "ffn_hidden_size": 20,
    "bias": False,
    "position": "rotary",
    "tie_embeddings": False,
}


def make_gpt2(folder: Path) -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=LENGTH,
        n_embd=HIDDEN,
        n_layer=LAYERS,
        n_head=HEADS,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    if dist.get_rank() == 0:
        (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=1, default=str))
    return GPT2LMHeadModel(config)


def make_megalm(folder: Path) -> torch.nn.Module:
    import yaml
    from megalm.models.gpt import build_full_model

    from megalm.config.schema import Model

    if dist.get_rank() == 0:
        (folder / "config.yaml").write_text(yaml.safe_dump({"model": MEGALM}))
    return build_full_model(Model(**MEGALM), VOCAB)


def initialise(model: torch.nn.Module, stage: int, bf16: bool) -> object:
    import deepspeed

    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage, "overlap_comm": False, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": bf16},
        "steps_per_print": 10**9,
    }
    optimizer = torch.optim.AdamW(groups, lr=1e-2, foreach=False)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def rank_main(rank: int, name: str) -> None:
    os.environ |= {
        "DS_ACCELERATOR": "cpu",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29641",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(RANKS),
    }
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would compile it; gloo does the work
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    deepspeed.init_distributed(dist_backend="gloo")
    stage, bf16 = CASES[name]
    folder = HERE / name
    torch.manual_seed(0)
    model = make_gpt2(folder) if name.startswith("gpt2") else make_megalm(folder)
    engine = initialise(model, stage, bf16)
    for step in range(2):
        tokens = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(10 * step + rank))
        output = engine(tokens)
        logits = output if isinstance(output, torch.Tensor) else output.logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())
        engine.backward(loss)
        engine.step()
    engine.save_checkpoint(str(folder), tag="global_step2")
    expected = full_weights(engine, stage)
    if rank == 0:
        np.savez_compressed(folder / "expected.npz", **expected)
    dist.barrier()
    dist.destroy_process_group()


def full_weights(engine: object, stage: int) -> dict[str, np.ndarray]:
    """fp32 masters by name, through DeepSpeed's own access to a live optimizer, not from the files."""
    from deepspeed.utils import safe_get_full_fp32_param

    return {name: safe_get_full_fp32_param(p).numpy().copy() for name, p in engine.module.named_parameters()}


def main() -> None:
    for name in sys.argv[1:] or CASES:
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        mp.spawn(rank_main, (name,), nprocs=RANKS)
        for script in folder.glob("zero_to_*.py"):  # DeepSpeed copies its own script there
            script.unlink()


if __name__ == "__main__":
    main()
