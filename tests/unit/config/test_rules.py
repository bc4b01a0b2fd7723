from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megalm.config import rules
from megalm.config.check import RULES, _after, find_violations, violations
from megalm.config.job import Job, planned_world_size_of, topology_of, with_value, world_size_of
from megalm.config.parse import config_from_dict, field_paths, section_names
from megalm.config.schema import Config
from megalm.config.support import BOUNDS, CHOICES, PROVEN
from megalm.mesh.topology import Topology
from tests.unit.config.random_invalid import SOUND, InvalidConfig, nested, random_invalid

LINE = re.compile(r"[a-z_0-9.]+=.*: .+; .+")


def config(**changes: Any) -> Config:
    return config_from_dict(nested({**SOUND, **{path.replace("__", "."): value for path, value in changes.items()}}))


def lines_of(**changes: Any) -> list[str]:
    changed = config(**changes)
    return violations(changed, world_size_of(changed))


def only_line(**changes: Any) -> str:
    (line,) = lines_of(**changes)
    return line


def test_the_sound_config_has_no_violations() -> None:
    assert lines_of() == []


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(random_invalid())
def test_every_injected_fault_is_named(invalid: InvalidConfig) -> None:
    parsed = config_from_dict(invalid.mapping)
    lines = violations(parsed, world_size_of(parsed))
    assert all(LINE.fullmatch(line) for line in lines), lines
    for fault in invalid.faults:
        assert any(line.startswith(f"{path}=") for path in fault.named for line in lines), (fault, lines)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(random_invalid(), st.lists(st.sampled_from([(8192, 0), (96, 0), (128, 32), (256, 64)]), max_size=2))
def test_every_remedy_is_legal(invalid: InvalidConfig, data: list[tuple[int, int]]) -> None:
    """Whatever is offered, and whatever the datasets' chunks: what was wrong no longer is, and nothing new is."""
    parsed = config_from_dict(invalid.mapping)
    world_size = world_size_of(parsed)
    if world_size < 1:
        return
    datasets = tuple(Dataset(f"data/{n}", 120, *chunk) for n, chunk in enumerate(data))
    found = find_violations(parsed, world_size, datasets)
    before = {(violation.field, violation.wrong) for violation in found}
    for violation in found:
        for fix in violation.fixes:
            for value in fix.values:
                after = _after(Job(parsed, world_size, datasets), fix.field, value)
                left = find_violations(after.config, after.world_size, datasets)
                assert len(left) < len(found), (str(violation), fix.field, value, list(map(str, left)))
                same = [other for other in left if other.field == fix.field]
                assert len(same) <= len([field for field, _ in before if field == fix.field])
                assert (violation.field, violation.wrong) not in {(other.field, other.wrong) for other in left}


def test_every_rule_stands_in_the_file_of_a_group_and_is_applied() -> None:
    files = [file.name for file in pkgutil.iter_modules(rules.__path__)]
    assert set(files) - {"fields"} <= set(section_names())
    modules = [importlib.import_module(f"{rules.__name__}.{name}") for name in files]
    written = {
        item.__name__
        for module in modules
        for item in vars(module).values()
        if inspect.isfunction(item) and item.__annotations__.get("return") == "Iterator[Violation]"
    }
    assert written == {rule.__name__ for rule in RULES}


def test_every_number_has_bounds_and_every_rule_a_name_and_a_doc() -> None:
    numbers = {path for path, kind in field_paths().items() if re.search(r"\b(int|float)\b", str(kind))}
    assert set(BOUNDS) == numbers
    assert all(rule.__doc__ for rule in RULES)
    assert len({rule.__name__ for rule in RULES}) == len(RULES)
    assert set(PROVEN) == set(CHOICES["engine.dtype"])


NEEDED_WITH: dict[str, dict[str, Any]] = {
    "model.rotary_scaling=linear": {"model__position": "rotary"},
    "model.rotary_scaling=llama3": {"model__position": "rotary"},
    "model.rotary_scaling=yarn": {"model__position": "rotary"},
    "optim.cooldown=sqrt": {"optim__schedule": "wsd"},
    "parallel.schedule=interleaved_1f1b": {"parallel__virtual_stages": 2},
}
"""What else a choice asks for."""


@pytest.mark.parametrize("path", sorted(CHOICES))
def test_every_listed_choice_is_accepted_and_others_are_listed(path: str) -> None:
    for choice in CHOICES[path]:
        changes = {path: choice, **NEEDED_WITH.get(f"{path}={choice}", {})}
        assert not [line for line in lines_of(**changes) if line.startswith(f"{path}=")]
    line = next(line for line in lines_of(**{path: "zzz"}) if line.startswith(f"{path}=zzz: there is no such choice; "))
    assert all(choice in line for choice in CHOICES[path])


def test_defaults_are_in_bounds_and_among_the_choices() -> None:
    minimal = {path: SOUND[path] for path in SOUND if not path.startswith(("launch", "parallel"))}
    parsed = config_from_dict(nested(minimal))
    assert violations(parsed, world_size_of(parsed)) == []


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"model__num_layers": 5, "parallel__pp": 8, "parallel__tp": 1},
            "model.num_layers=5: too few for the 8 pipeline stages of parallel.pp=8, each needs one; "
            "at least 8 layers, or parallel.pp=2 or 4",
        ),
        (
            {"parallel__tp": 8, "model__num_heads": 4, "launch__ranks": 16},
            "parallel.tp=8: does not divide model.num_heads=4; parallel.tp=2 or 4",
        ),
        (
            {"train__global_batch_size": 10},
            "train.global_batch_size=10: not a multiple of dp*micro_batch_size = 2*2 = 4 on 8 ranks; "
            "train.global_batch_size=8 or 12, or train.micro_batch_size=1 or 5",
        ),
        (
            {"model__num_heads": 5},
            "model.num_heads=5: does not divide model.hidden_size=64; model.num_heads=2, 4, 8, 16, 32 or 64, "
            "or model.hidden_size=65",
        ),
        (
            {"model__head_dim": 7, "model__position": "rotary"},
            "model.head_dim=7: an odd number of elements, and model.position=rotary turns pairs of them; "
            "model.head_dim=8, or model.position=learned",
        ),
        (
            {"model__head_dim": 0},
            "model.head_dim=0: out of range; at least 1 and at most 2147483647",
        ),
        (
            {"model__head_dim": 3, "model__num_kv_heads": 1},
            "parallel.tp=2: does not divide the 3 rows of model.num_kv_heads=1 heads; parallel.tp=1, "
            "or model.num_kv_heads=null",
        ),
        (
            {"engine__zero_stage": 2},
            "engine.zero_stage=2: ZeRO-2 would repeat its collectives for every micro-batch of the pipeline "
            "(parallel.pp=2); engine.zero_stage=1",
        ),
        (
            {"engine__zero_stage": 0},
            "engine.zero_stage=0: ZeRO-0 with engine.dtype=bf16 is not in this version: no test proves its gradient "
            "norm; engine.zero_stage=1, or engine.dtype=fp32",
        ),
        (
            {"engine__zero_stage": 3, "parallel__pp": 1, "parallel__tp": 1, "engine__dtype": "fp16"},
            "engine.zero_stage=3: ZeRO-3 with engine.dtype=fp16 is not in this version: no test proves its gradient "
            "norm; engine.zero_stage=1 or 2, or engine.dtype=bf16 or fp32",
        ),
        (
            {"engine__zero_stage": 3, "parallel__pp": 1},
            "parallel.tp=2: DeepSpeed's ZeRO-3 leaves parameters out of the gradient norm under tensor parallelism; "
            "engine.zero_stage=1 or 2",
        ),
        (
            {"engine__zero_stage": 0, "engine__dtype": "fp32", "engine__reduce_dtype": "bf16"},
            "engine.reduce_dtype=bf16: at engine.zero_stage=0 replicas own no pieces of the gradients; "
            "engine.reduce_dtype=fp32, or engine.zero_stage=1",
        ),
        (
            {"engine__zero_stage": 3, "parallel__pp": 1, "parallel__tp": 1, "engine__reduce_dtype": "bf16"},
            "engine.reduce_dtype=bf16: at engine.zero_stage=3 DeepSpeed reduces in fp32; "
            "engine.reduce_dtype=fp32, or engine.zero_stage=1 or 2",
        ),
        (
            {
                "engine__zero_stage": 3,
                "parallel__pp": 1,
                "parallel__tp": 1,
                "engine__gradient_accumulation_fusion": True,
            },
            "engine.gradient_accumulation_fusion=true: not in this version with ZeRO-3; "
            "engine.gradient_accumulation_fusion=false, or engine.zero_stage=1 or 2",
        ),
        (
            {"train__batch_ramp_start": 6, "train__batch_ramp_tokens": 100, "train__global_batch_size": 24},
            "train.batch_ramp_start=6: not a multiple of dp*micro_batch_size = 2*2 = 4 on 8 ranks; "
            "train.batch_ramp_start=4, 8, 12 or 24, or train.micro_batch_size=1 or 3",
        ),
        (
            {
                "train__batch_ramp_start": 8,
                "train__batch_ramp_increment": 12,
                "train__batch_ramp_tokens": 100,
                "train__global_batch_size": 24,
            },
            "train.batch_ramp_increment=12: does not divide the rise from train.batch_ramp_start=8 to "
            "train.global_batch_size=24; train.batch_ramp_increment=4, 8 or 16, or train.batch_ramp_start=12 or 24",
        ),
        (
            {"train__batch_ramp_start": 4},
            "train.batch_ramp_tokens=0: no tokens to rise over from train.batch_ramp_start=4; "
            "train.batch_ramp_tokens=256, or train.batch_ramp_start=null",
        ),
        (
            {
                "optim__cooldown_tokens": 70,
                "optim__schedule": "wsd",
                "optim__decay_tokens": 100,
                "optim__warmup_tokens": 40,
            },
            "optim.cooldown_tokens=70: longer than the 60 tokens between optim.warmup_tokens=40 and "
            "optim.decay_tokens=100; at most 60, or optim.cooldown_tokens=null, or optim.decay_tokens=110",
        ),
        ({"run__name": "my run/1"}, "my-run-1"),
        (
            {"launch__ranks": 6},
            "launch.ranks=6: not a multiple of tp*pp*cp = 2*2*1 = 4; a multiple of 4, or launch.ranks=4 or 8",
        ),
    ],
)
def test_messages_say_what_is_wrong_and_what_would_be_right(changes: dict[str, Any], line: str) -> None:
    assert line in "\n".join(lines_of(**changes))


def test_attention_dropout_is_bounded_where_gpus_compute() -> None:
    """32 sequences x 8 heads of a rank x 2,048 squared x 4 bytes are 4 GiB a layer."""
    large = {
        "model__attention_dropout": 0.1,
        "model__num_heads": 16,
        "model__hidden_size": 256,
        "model__sequence_length": 2048,
        "train__micro_batch_size": 32,
        "train__global_batch_size": 32,
    }
    assert not any("attention_dropout" in line for line in lines_of(**large)), "on the CPU it may be slow"
    for known in ({"launch__device": "cuda"}, {"cluster__gpu": "h100_80gb"}):
        (line,) = [line for line in lines_of(**large, **known) if line.startswith("model.attention_dropout=0.1")]
        assert "4.0 GiB each in fp32" in line
        assert "or train.micro_batch_size=8" in line
        for fits in ({"train__micro_batch_size": 8}, {"model__attention_dropout": 0.0}):
            assert not any("attention_dropout" in line for line in lines_of(**{**large, **known, **fits}))
    ring = {"parallel__cp": 2, "parallel__cp_attention": "ring", "launch__device": "cuda"}
    assert not any("attention_dropout" in line for line in lines_of(**large, **ring)), "a ring has tiles"


def test_layers_need_not_divide_stages() -> None:
    assert lines_of(model__num_layers=5) == []


def test_a_launchers_rank_count_is_checked_too() -> None:
    (line,) = violations(config(), 6)
    assert line.startswith("world_size=6: not a multiple of tp*pp*cp = 2*2*1 = 4; ")
    (line,) = violations(config(cluster__gpus=6), 6)
    assert line.startswith("cluster.gpus=6: ")
    assert any(line.startswith("world_size=0") for line in violations(config(), 0))


def test_a_warmup_longer_than_the_run_is_no_violation_but_one_longer_than_the_decay_is() -> None:
    assert lines_of(optim__warmup_tokens=10**9) == []
    assert only_line(optim__warmup_tokens=100, optim__decay_tokens=50).startswith("optim.warmup_tokens=100: not below")
    assert lines_of(optim__warmup_tokens=100, optim__decay_tokens=50, optim__schedule="constant") == []


def test_a_ramp_and_a_cooldown_that_fit() -> None:
    ramp = {"train__batch_ramp_start": 4, "train__batch_ramp_tokens": 64}
    assert lines_of(**ramp, train__global_batch_size=16) == []
    assert lines_of(**ramp, train__global_batch_size=16, train__batch_ramp_increment=12) == []
    assert lines_of(**ramp, train__global_batch_size=4) == []
    assert lines_of(optim__schedule="wsd", optim__cooldown_tokens=10**9, optim__cooldown="sqrt") == []


def test_heads_whose_width_is_given_need_not_divide_the_hidden_size() -> None:
    assert lines_of(model__num_heads=6, model__num_kv_heads=2, model__head_dim=20, model__position="rotary") == []
    assert lines_of(model__num_heads=6, model__num_kv_heads=2) != []


def test_a_micro_batch_that_splits_every_size_of_a_ramp_leaves_the_ramp_alone() -> None:
    sizes = {"train__batch_ramp_start": 6, "train__batch_ramp_increment": 2, "train__global_batch_size": 24}
    ramp = {**sizes, "train__batch_ramp_tokens": 100}
    assert all("train.micro_batch_size=1" in line for line in lines_of(**ramp))
    assert len(lines_of(**ramp)) == 2
    assert lines_of(**ramp, train__micro_batch_size=1) == []
    (line,) = lines_of(
        **{**ramp, "train__batch_ramp_start": 9, "train__batch_ramp_increment": 3, "train__micro_batch_size": 1}
    )[:1]
    assert "micro_batch_size=" not in line.partition("; ")[2], "two replicas share no odd batch"


def test_a_named_checkpoint_and_initial_weights_exclude_each_other() -> None:
    assert lines_of(checkpoint__init_from="runs/a") == []
    assert lines_of(checkpoint__resume="runs/a") == []
    assert only_line(checkpoint__init_from="runs/a", checkpoint__resume="runs/b").startswith("checkpoint.init_from=")


def test_world_sizes() -> None:
    assert world_size_of(config(launch__ranks=0)) == 4
    assert world_size_of(config()) == 8
    assert planned_world_size_of(config(cluster__gpus=16)) == 16
    assert planned_world_size_of(config()) == 8
    assert topology_of(config(), 8) == Topology(tp=2, pp=2, dp=2)


@dataclass(frozen=True)
class Dataset:
    """What the rules see of one."""

    location: str = "data/none"
    vocab_size: int = 100
    chunk_tokens: int = 128
    packed_length: int = 0
    masked: bool = False


def test_what_the_data_ask_for() -> None:
    good = config(model__vocab_size=100, model__sequence_length=32)

    def lines(changed: Config, *datasets: Dataset) -> list[str]:
        return violations(changed, 8, datasets)

    assert lines(good, Dataset()) == []
    assert lines(good, Dataset(packed_length=32)) == []
    assert lines(with_value(good, "model.vocab_size", None), Dataset(vocab_size=5000)) == []
    too_small, uneven = lines(with_value(good, "model.sequence_length", 48), Dataset(vocab_size=101))
    assert too_small == "model.vocab_size=100: the dataset data/none has 101 words; model.vocab_size=101 or null"
    assert uneven.startswith("model.sequence_length=48: does not divide the chunks of 128 tokens")
    assert uneven.endswith("; model.sequence_length=2, 4, 8, 16, 32 or 64")
    assert lines(good, Dataset(packed_length=64)) == [
        "model.sequence_length=32: the dataset data/none was packed for sequences of 64 tokens; "
        "model.sequence_length=64"
    ]
    assert lines(good, Dataset(packed_length=64), Dataset("data/other", chunk_tokens=96)) == [
        "model.sequence_length=32: the dataset data/none was packed for sequences of 64 tokens; "
        "datasets of data.path that take one common length: prepare one of them again"
    ]
    tuned = with_value(good, "objective.name", "sft")
    assert lines(tuned, Dataset(), Dataset(masked=True)) == [], "plain text may be mixed in"
    assert lines(tuned, Dataset()) == [
        "objective.name=sft: no dataset of data.path has a loss mask, so prompts would carry loss like completions; "
        "data of `megalm prepare --corpus sft`, or objective.name=clm"
    ]


def test_a_length_that_is_offered_fits_the_layout_and_the_data_at_once() -> None:
    """The nearest multiples of the pieces, 92 and 96, do not divide the data's chunks; 2 divides and is no multiple."""
    bad = config(parallel__cp=2, parallel__pp=1, parallel__sequence_parallel=True, model__sequence_length=94)
    assert any("model.sequence_length=92 or 96" in line for line in violations(bad, 8))
    both = violations(bad, 8, [Dataset(chunk_tokens=8192)])
    assert len(both) == 2
    assert all("; model.sequence_length=4, 8, 16, 32, 64 or 128" in line for line in both), both


def test_rules_do_not_change_the_config() -> None:
    bad = config(parallel__tp=3)
    before = replace(bad, **{item.name: getattr(bad, item.name) for item in fields(bad)})
    violations(bad, 12)
    assert bad == before


def test_wandb_names_are_what_wandb_takes() -> None:
    assert lines_of(logging__wandb_tags=["a", "b c"], logging__wandb_project="größe 1") == []
    assert only_line(logging__wandb_tags=["x" * 65]).endswith(": 65 characters in a tag; at most 64 in each")
    assert only_line(logging__wandb_tags=["a", "b", "a"]).endswith("a is there twice; each tag once")
    assert only_line(logging__wandb_tags=["a", " "]).startswith("logging.wandb_tags=")
    assert "W&B takes no / in a project" in only_line(logging__wandb_project="team/p")
    assert "129 characters" in only_line(logging__wandb_project="p" * 129)
    assert only_line(checkpoint__every_minutes=-1).startswith("checkpoint.every_minutes=-1.0: out of range")


@pytest.mark.parametrize(
    "name", ["two words", "größe 训练 ۱۲", "it's (1) 50% {x} a=b, #2 & co", "می‌خواهم", "a.b_c-d+e", "x" * 200]
)
def test_a_run_may_be_named_in_any_language(name: str) -> None:
    assert lines_of(run__name=name) == []


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        "a/b",
        "a\\b",
        "..",
        ".hidden",
        "-rf",
        "~",
        "a ",
        " a",
        "a.",
        "a:b",
        "a\nb",
        "a\u202eb",
        "训" * 67,
        "con\0",
    ],
)
def test_what_is_no_folder_name_is_refused_with_one_that_is(name: str) -> None:
    line = lines_of(run__name=name)[-1]
    offered = re.search(r"; run\.name=(.+)$", line)
    assert line.startswith("run.name=") and offered
    assert lines_of(run__name=offered[1]) == []


def test_tasks_are_refused_with_the_known_ones_before_anything_starts() -> None:
    assert lines_of(evaluate__tasks=["qa", "arithmetic"], evaluate__data=["a.jsonl", "b.jsonl"]) == []
    assert only_line(evaluate__tasks="arithmatic") == (
        "evaluate.tasks=arithmatic: there is no such task; did you mean arithmetic?"
    )
    assert only_line(evaluate__tasks="xyz") == (
        "evaluate.tasks=xyz: there is no such task; arithmetic, cloze, multiple_choice, qa, summarisation or "
        "translation, or a file NAME.yaml"
    )
    assert only_line(evaluate__tasks="none.yaml").endswith(": there is no such file; a task file, or a task's name")
    assert only_line(evaluate__tasks=["qa", "qa"]).endswith(": a task is there twice; each task once")
    assert only_line(evaluate__tasks="qa", evaluate__data=["a", "b"]) == (
        'evaluate.data=["a", "b"]: 2 for the 1 of evaluate.tasks; one for each, in their order, or evaluate.data=null'
    )
    assert only_line(evaluate__tasks="memorisation") == (
        "evaluate.tasks=memorisation: asks a trained model for what the run has read until then; "
        "megalm evaluate RUN --task memorisation, after training"
    )
    encoder = {"model__causal": False, "objective__name": "mlm"}
    assert only_line(evaluate__tasks="qa", **encoder) == (
        'evaluate.tasks=["qa"]: model.causal=false continues no text; evaluate.tasks=null'
    )
