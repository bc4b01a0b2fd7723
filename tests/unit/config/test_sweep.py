"""``-m``: which runs several values come to, and what they are called."""

from __future__ import annotations

import pytest

from megalm.config.check import violations
from megalm.config.compose import compose, group_options
from megalm.config.job import world_size_of
from megalm.config.sweep import SweepRun, sweep_runs
from megalm.errors import ConfigError


def runs_of(*arguments: str) -> list[SweepRun]:
    return sweep_runs(["experiment=quickstart", *arguments])


def lines_of(*arguments: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        runs_of(*arguments)
    return caught.value.lines


def test_every_combination_is_a_run_and_the_last_value_changes_fastest() -> None:
    runs = runs_of("optim.lr=1e-3,3e-3", "run.seed=1", "parallel=single,tp2")
    assert [run.swept for run in runs] == [
        ("optim.lr=0.001", "parallel=single"),
        ("optim.lr=0.001", "parallel=tp2"),
        ("optim.lr=0.003", "parallel=single"),
        ("optim.lr=0.003", "parallel=tp2"),
    ]
    assert [run.name for run in runs] == [
        "quickstart-lr=0.001-parallel=single",
        "quickstart-lr=0.001-parallel=tp2",
        "quickstart-lr=0.003-parallel=single",
        "quickstart-lr=0.003-parallel=tp2",
    ]
    for run in runs:
        config = compose(run.arguments)
        assert config.run.name == run.name and config.run.seed == 1
        assert violations(config, world_size_of(config)) == []
    assert compose(runs[3].arguments).optim.lr == 0.003
    assert compose(runs[3].arguments).parallel.tp == 2


@pytest.mark.parametrize(
    ("override", "values"),
    [
        ("train.steps=choice(1,2)", ["1", "2"]),
        ("train.steps=range(1,7,2)", ["1", "3", "5"]),
        ("train.steps=sort(3,1)", ["1", "3"]),
        ("parallel.stage_layers=[1,2],null", ["[1,2]", "null"]),
        ("model.bias=true,false", ["true", "false"]),
        ("data.path=[a,b],c", ["[a,b]", "c"]),
        ("report.prompt='a,b',it's", ["'a,b'", "it's"]),
        ("report.prompt=choice(x y,50%)", ["x y", "50%"]),
        ("parallel=glob(tp2*)", [name for name in group_options()["parallel"] if name.startswith("tp2")]),
    ],
)
def test_sweeps_in_hydras_grammar(override: str, values: list[str]) -> None:
    key = override.partition("=")[0]
    assert [run.swept for run in runs_of(override)] == [(f"{key}={value}",) for value in values]


def test_one_value_is_no_sweep() -> None:
    (run,) = runs_of("optim.lr=1e-3", "report.prompt='a,b'", "data.path=[a,b]")
    assert (run.name, run.swept) == ("quickstart", ())


def test_names_stay_where_they_differ_already() -> None:
    assert [run.name for run in sweep_runs(["experiment=quickstart,quickstart_bert"])] == [
        "quickstart",
        "quickstart_bert",
    ]
    assert [run.name for run in runs_of("run.name=a,b")] == ["a", "b"]
    assert [run.name for run in runs_of("run.name=rate ${optim.lr}", "optim.lr=1,2")] == ["rate 1", "rate 2"]
    assert [run.name for run in runs_of("run.name=a,b", "optim.lr=1,2")] == ["a-lr=1", "a-lr=2", "b-lr=1", "b-lr=2"]


def test_names_are_folder_names() -> None:
    names = [
        run.name
        for run in runs_of("data.path=data/größe 1,[a/b,C:\\x]", "train.steps=1,2", "model.num_kv_heads=null,2")
    ]
    assert names[0] == "quickstart-path=data-größe-1-steps=1-num_kv_heads=none"
    assert names[-1] == "quickstart-path=a-b+C-x-steps=2-num_kv_heads=2"
    assert all(
        violations(config, world_size_of(config)) == []
        for config in (compose([f"run.name={name}", "experiment=quickstart"]) for name in names)
    )
    both = [run.name for run in runs_of("train.validate_every=10,20", "logging.every=1,2")]
    assert both[0] == "quickstart-validate_every=10-every=1"
    same = [run.name for run in runs_of("checkpoint.every=10,20", "logging.every=1,2")]
    assert same[0] == "quickstart-checkpoint.every=10-logging.every=1"


def test_two_runs_of_one_name_are_refused() -> None:
    assert lines_of("data.path=a/b,a-b") == [
        'run.name="quickstart-path=a-b": the name of two runs, data.path=a/b and data.path=a-b; values that differ in '
        "letters or digits, or a run.name of each: run.name=A,B"
    ]
    assert lines_of("optim.lr=0.001,1e-3")[0].startswith('run.name="quickstart-lr=0.001": the name of two runs')
    assert lines_of("report.prompt=a,A")[0].startswith('run.name="quickstart-prompt=A": the name of two runs')


def test_what_is_wrong_with_any_run_is_told_once_before_the_first_begins() -> None:
    assert lines_of("parallel.tp=1,0,x", "train.stepss=1,2", "optim.lr=interval(0,1)") == [
        'train.stepss="1,2": there is no such field; did you mean train.steps?',
        'optim.lr="interval(0,1)": several values, and a run has one; one value; megalm train -m '
        "optim.lr=interval(0,1) trains a run with each",
        "parallel.tp=0: parallel.tp=0: out of range; at least 1 and at most 2147483647",
        "parallel.tp=x: parallel.tp=x: this is text; an integer",
    ]
    assert lines_of("parallel=glob(nothing*)")[0].startswith('parallel="glob(nothing*)": no option has such a name; ')
    assert lines_of("run.seed=range(1,100)", "optim.lr=range(1,100)") == [
        "-m: 9801 runs; at most 1000, in several commands"
    ]
