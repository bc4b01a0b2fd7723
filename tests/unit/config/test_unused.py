"""Settings without effect are said, in the words of the field that is the reason."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megalm.config.compose import compose
from megalm.config.job import Job, with_value
from megalm.config.schema import Config, Data, Model, Optim, Run, Train
from megalm.config.unused import unused_overrides, unused_settings

CONFIG = Config(
    run=Run(name="try1"),
    model=Model(num_layers=2, hidden_size=64, num_heads=4, sequence_length=32),
    data=Data(path=("books",)),
    optim=Optim(lr=1e-3),
    train=Train(steps=10, micro_batch_size=1, global_batch_size=8),
)


def lines(ranks: int = 2, *, is_launched: bool = False, **fields: object) -> list[str]:
    config = CONFIG
    for path, value in fields.items():
        config = with_value(config, path.replace("__", "."), value)
    return unused_settings(Job(config, ranks), is_launched=is_launched)


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        (
            {"optim__schedule": "constant", "optim__decay_tokens": 9, "optim__min_lr_ratio": 0.0},
            ["optim.decay_tokens=9: not used, as optim.schedule=constant", "optim.min_lr_ratio=0.0: not used"],
        ),
        ({"parallel__cp_attention": "ring"}, ["parallel.cp_attention=ring: not used, as parallel.cp=1"]),
        ({"parallel__sequence_parallel": True}, ["parallel.sequence_parallel=true: not used, as parallel.tp=1"]),
        ({"model__rotary_base": 5e5}, ["model.rotary_base=500000.0: not used, as model.position is not rotary"]),
        ({"objective__mask_probability": 0.3}, ["objective.mask_probability=0.3: not used"]),
        ({"data__weights": (2.0,)}, ["data.weights=[2.0]: not used, as there is one data.path"]),
        ({"data__cache_gib": 9.0}, ["data.cache_gib=9.0: not used, as no data.path is a pipe:"]),
        ({"engine__loss_scale_window": 9}, ["engine.loss_scale_window=9: not used, as engine.dtype is not fp16"]),
        ({"engine__recompute_every": 2}, ["engine.recompute_every=2: not used, as engine.recompute=none"]),
        ({"engine__zero_stage": 3, "engine__bucket_mib": 9.0}, ["engine.bucket_mib=9.0: not used, as engine.zero_st"]),
        ({"checkpoint__keep_last": 0, "checkpoint__keep_every": 2000}, ["checkpoint.keep_every=2000: not used, as"]),
        ({"checkpoint__every": 0, "checkpoint__keep_every": 2000}, ["checkpoint.keep_every=2000: not used, as"]),
        ({"logging__wandb": "disabled", "logging__wandb_project": "p"}, ["logging.wandb_project=p: not used"]),
        (
            {"logging__wandb": "disabled", "logging__wandb_tags": ("a",), "logging__wandb_notes": "n"},
            ['logging.wandb_tags=["a"]: not used, as logging.wandb=disabled', "logging.wandb_notes=n: not used"],
        ),
        ({"train__validation_samples": 9}, ["train.validation_samples=9: not used, as train.validate_every=0"]),
        ({"report__top_k": 9}, ["report.top_k=9: not used, as report.prompt=null"]),
        ({"cluster__gpus": 8}, ["cluster.gpus=8: not used, as it is the size that megalm check plans for"]),
        ({"launch__ranks": 4}, ["launch.ranks=4: not used, as cluster.gpus=0 is what is checked"]),
    ],
)
def test_what_has_no_effect_is_said(fields: dict[str, object], wanted: list[str]) -> None:
    found = lines(**fields)
    assert len(found) == len(wanted)
    assert all(line.startswith(start) for line, start in zip(found, wanted, strict=True)), found


def test_a_launcher_takes_no_ranks_from_the_config() -> None:
    assert lines(4, is_launched=True, launch__ranks=2) == [
        "launch.ranks=2: not used, as a launcher has started 4",
    ]
    (line,) = lines(4, is_launched=True, launch__ranks=4, launch__threads_per_rank=8)
    assert line.startswith("launch.threads_per_rank=8: not used, as a launcher has started the ranks")


def test_defaults_and_what_has_an_effect_are_not_said() -> None:
    assert lines() == []
    assert lines(optim__schedule="constant", launch__ranks=2) == []
    assert lines(parallel__cp=2, parallel__cp_attention="ring") == []
    assert lines(model__position="rotary", model__rotary_base=5e5) == []
    quick = compose(["experiment=quickstart"])
    assert unused_settings(Job(quick, 4), is_launched=False) == []
    assert unused_settings(Job(replace(quick, data=replace(quick.data, path=("a", "b"))), 4), is_launched=True) == []


def test_overrides_that_a_command_takes_and_does_not_use_are_said() -> None:
    overrides = [
        "parallel.tp=2",
        "parallel.schedule=gpipe",
        "launch.device=cpu",
        "model.dropout=0.1",
        "train.micro_batch_size=2",
        "data.path=a",
    ]
    assert unused_overrides("evaluate", overrides) == ["parallel.schedule=gpipe: not used by megalm evaluate"]
    assert unused_overrides("evaluate --task memorisation", ["data.phase=0", "train.micro_batch_size=3"]) == [
        "train.micro_batch_size=3: not used by megalm evaluate --task memorisation"
    ]
    assert unused_overrides("generate", overrides) == [
        "parallel.schedule=gpipe: not used by megalm generate",
        "train.micro_batch_size=2: not used by megalm generate",
        "data.path=a: not used by megalm generate",
    ]
