"""A user's own configs: where they are found, what wins, where each value is from, and faults with file and line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megalm.config.compose import Source, compose, composition, conf_dir
from megalm.config.search_path import SearchPath
from megalm.errors import ConfigError

Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a file below the working folder."""
    monkeypatch.chdir(tmp_path)

    def written(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return written


def lines_of(*arguments: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        compose(arguments)
    return caught.value.lines


EXPERIMENT = """\
# @package _global_
defaults:
  - quickstart
  - override /parallel: tp2
run: {name: mine}
train:
  steps: 7
"""


def test_a_conf_folder_in_the_working_folder_is_found(write: Write) -> None:
    write("conf/experiment/mine.yaml", EXPERIMENT)
    write(
        "conf/experiment/by topic/größe 2.yaml",
        EXPERIMENT.replace("7", "8").replace("- quickstart", "- /experiment/quickstart"),
    )
    config = compose(["experiment=mine"])
    assert (config.run.name, config.train.steps, config.parallel.tp, config.parallel.pp) == ("mine", 7, 2, 1)
    assert config.train.micro_batch_size == 4, "of the experiment that it begins with"
    assert compose(["experiment=by topic/größe 2"]).train.steps == 8
    assert compose(["experiment=quickstart"]).train.steps == 600, "megalm's own are there as well"


def test_the_first_folder_that_has_an_option_gives_it(write: Write, tmp_path: Path) -> None:
    for number, folder in enumerate(["first", "second", "conf", "last"], start=1):
        write(f"{folder}/engine/mine.yaml", f"recompute_every: {number}\n")
        write(f"{folder}/engine/only_{folder}.yaml", f"recompute_every: {number}0\n")
        write(
            f"{folder}/model/quickstart.yaml",
            f"num_layers: {number}\nhidden_size: 8\nnum_heads: 1\nsequence_length: 8\n",
        )
    dirs = ["--config-dir=first", f"--config-dir={tmp_path / 'second'}"]
    last = f"hydra.searchpath=[file://{tmp_path / 'last'}]"

    def every(*arguments: str) -> int:
        return compose(["model=gpt3_125m", *arguments]).engine.recompute_every

    assert every("engine=mine", *dirs, last) == 1
    assert every("engine=mine", dirs[1], last) == 2
    assert every("engine=mine", last) == 3
    assert [every(f"engine=only_{name}", *dirs, last) for name in ("first", "second", "conf", "last")] == [
        10,
        20,
        30,
        40,
    ]
    assert every("engine=only_last", "hydra.searchpath=last") == 40
    assert compose(["model=quickstart", dirs[0]]).model.num_layers == 1, "also before megalm's own of that name"
    reasons = [folder.reason for folder in SearchPath.of(["first"], ["last"]).folders]
    assert reasons == ["--config-dir", "./conf", "hydra.searchpath", "megalm"]


def test_the_primary_config_is_megalms(write: Write) -> None:
    write("conf/config.yaml", "train: {steps: 3}\n")
    made = composition(["experiment=quickstart"])
    assert made.config.train.steps == 600
    assert made.notes == (
        "conf/config.yaml: not used; every run begins with megalm's own config.yaml, so settings belong in a file in "
        "conf/experiment or in one given with --config",
    )


def test_folders_that_are_not_there_are_all_refused(write: Write) -> None:
    write("file", "")
    assert lines_of(
        "--config-dir=nowhere", "--config-dir=file", "hydra.searchpath=[pkg://no_such_package,x]", "trian.steps=1"
    ) == [
        "--config-dir=nowhere: no such folder; a folder with groups in it, such as DIR/experiment/",
        "--config-dir=file: not a folder; a folder with groups in it, such as DIR/experiment/",
        'hydra.searchpath="pkg://no_such_package": no such package; a folder, file://FOLDER or pkg://PACKAGE',
        "hydra.searchpath=x: no such folder; a folder with groups in it, such as DIR/experiment/",
        "trian.steps=1: there is no such field; did you mean train.steps?",
    ]


def test_a_config_file_is_a_list_of_overrides(write: Write) -> None:
    write("conf/experiment/mine.yaml", EXPERIMENT)
    write("my.yaml", "experiment: mine\ntrain.steps: 50\noptim:\n  lr: 1e-3\n  warmup_tokens: 64\nmodel.dropout: 0.1\n")
    config = compose(["--config=my.yaml"])
    assert (config.run.name, config.train.steps, config.model.dropout) == ("mine", 50, 0.1)
    assert (config.optim.lr, config.optim.warmup_tokens) == (1e-3, 64)
    assert compose(["--config=my.yaml", "train.steps=60"]).train.steps == 60, "what is typed wins"
    assert compose(["train.steps=60", "--config=my.yaml"]).train.steps == 60, "wherever it stands"
    write("other.yaml", "optim: {lr: 2e-3}\nparallel: tp4\n")
    both = compose(["--config=my.yaml", "--config=other.yaml"])
    assert (both.optim.lr, both.train.steps, both.parallel.tp) == (2e-3, 50, 4)
    assert compose(["--config=other.yaml", "experiment=mine", "parallel=single"]).parallel.tp == 1
    assert compose(["--config=other.yaml", "experiment=mine"]).parallel.tp == 4, (
        "named for itself: no experiment changes it"
    )


def test_faults_of_a_config_file_name_their_lines(write: Write) -> None:
    write(
        "my.yaml", "experimnt: quickstart\n\ntrain:\n  stepss: 5\n  steps: many\nmodel: gpt3_1\ndefaults: [a]\nrun: 5\n"
    )
    assert lines_of("--config=my.yaml", "--config=none.yaml") == [
        "none.yaml: cannot be read (No such file or directory); give the path of a YAML file",
        "my.yaml:1: experimnt=quickstart: there is no such group or section; did you mean experiment?",
        "my.yaml:4: train.stepss=5: there is no such field; did you mean train.steps?",
        "my.yaml:6: model=gpt3_1: there is no such option; did you mean model=gpt3_13b, gpt3_1_3b or gpt3_175b?",
        "my.yaml:7: defaults: a file of settings has no defaults list; name options as experiment: quickstart; a file "
        "in DIR/experiment/ can have one",
        "my.yaml:8: run=5: a whole section; set its fields: run.name, run.dir and run.seed",
        "my.yaml:5: train.steps=many: this is text; an integer",
    ]


@pytest.mark.parametrize(
    ("text", "line", "wrong"),
    [
        ("num_layers: 2\n\thidden_size: 8\n", 2, "a tab in the indentation; indent with spaces"),
        ("num_layers: 2\nnum_layers: 3\nnum_heads: 1\nnum_heads: 1\n", 2, "num_layers is given in line 1 already"),
        (
            "num_layers: 2\n  hidden_size: 8\n",
            2,
            "this line is indented deeper than the one above, or has a second ': '",
        ),
        ("  num_layers: 2\nhidden_size: 8\n", 2, "the indentation or the colon does not fit the lines above"),
        ("hello\n", 1, "this is text (hello); a mapping"),
        ("# a comment\n- num_layers\n", 2, "this is a list; a mapping"),
        ("num_layers: [1, 2\nx: 1\n", 2, "a list is not closed"),
        ('num_layers: "2\n', 2, "a quote is not closed"),
        ("num_layers: @2\n", 1, "a value begins with a character that YAML reserves"),
        ("num_layers: !!python/object:x 2\n", 1, "a tag (!NAME) that is not plain YAML"),
        (
            "num_layers: 2\nhiden_size: 8\n",
            2,
            "model.hiden_size=8: there is no such field; did you mean model.hidden_size",
        ),
        ("num_layers: two\n", 1, "model.num_layers=two: this is text; an integer"),
        ("# mine\nmodel:\n  num_layers: 2\n", 2, "model inside model; this file is the section model"),
        ("# @package modell\nnum_layers: 2\n", 1, "there is no section modell"),
    ],
)
def test_faults_of_group_files_name_file_and_line(write: Write, text: str, line: int, wrong: str) -> None:
    write("conf/model/mine.yaml", text)
    found = lines_of("model=mine")
    assert any(one.startswith(f"conf/model/mine.yaml:{line}: {wrong}") for one in found), found


def test_text_that_is_not_utf_8_is_said(write: Write) -> None:
    write("conf/model/mine.yaml", "").write_bytes("# mine\n# größe\nnum_layers: 2\n".encode("latin-1"))
    assert lines_of("model=mine")[0].startswith("conf/model/mine.yaml:2: not UTF-8")


def test_faults_of_two_files_are_told_together(write: Write) -> None:
    write("conf/model/mine.yaml", "num_layers: 1\nnum_layers: 2\nx: 1\nx: 2\n")
    write("conf/optim/mine.yaml", "- lr\n")
    assert [line.partition(": ")[0] for line in lines_of("optim=mine")] == ["conf/optim/mine.yaml:1"]
    assert {line.partition(": ")[0] for line in lines_of("model=mine")} == {
        "conf/model/mine.yaml:2",
        "conf/model/mine.yaml:4",
    }


def test_an_experiment_without_its_package_line_is_recognised(write: Write) -> None:
    write("conf/experiment/mine.yaml", EXPERIMENT.replace("# @package _global_\n", "# mine\n"))
    (line,) = lines_of("experiment=mine")
    assert line == (
        'conf/experiment/mine.yaml:1: the line "# @package _global_" is missing, so that its settings would go into a '
        'section "experiment", which does not exist; make it the first line'
    )


def test_a_defaults_list_that_names_nothing_is_one_line(write: Write) -> None:
    write("conf/experiment/mine.yaml", EXPERIMENT.replace("tp2", "tp3").replace("- quickstart", "- quickstrat"))
    assert lines_of("experiment=mine") == [
        "conf/experiment/mine.yaml:2: there is no experiment/quickstrat; did you mean quickstart or quickstart_bert?",
        "conf/experiment/mine.yaml:2: there is no parallel/tp3; did you mean tp8, tp4 or tp2?",
    ]
    write("conf/experiment/mine.yaml", EXPERIMENT.replace("tp2", "tp3"))
    assert compose(["experiment=mine", "parallel=tp4"]).parallel.tp == 4, "another choice was typed"
    write("conf/experiment/mine.yaml", EXPERIMENT.replace("override /parallel: tp2", "/parallel: tp2"))
    assert lines_of("experiment=mine") == [
        'conf/experiment/mine.yaml:2: "/parallel: tp2" chooses an option of a group for which config.yaml has chosen '
        'one; "override /parallel: tp2"'
    ]


def test_a_misspelt_option_hides_no_other_mistake(write: Write) -> None:
    write("conf/experiment/mine.yaml", EXPERIMENT)
    assert lines_of("experiment=min", "train.steps=many", "parallel.tp=0", "optim.schedule=sine", "modle.x=1") == [
        "experiment=min: there is no such option; did you mean experiment=mine?",
        "modle.x=1: there is no such field; the sections are run, model, data, optim, train, launch, parallel, "
        "objective, engine, checkpoint, logging, cluster, report and evaluate",
        "train.steps=many: this is text; an integer",
        "parallel.tp=0: out of range; at least 1 and at most 2147483647",
        "optim.schedule=sine: there is no such choice; optim.schedule=cosine, linear, constant or wsd",
    ]


def test_each_value_says_where_it_is_from(write: Write) -> None:
    write("conf/experiment/mine.yaml", EXPERIMENT)
    write("my.yaml", "optim.lr: 0.5\n")
    places = composition(
        ["experiment=mine", "--config=my.yaml", "run.seed=3", "~data.lanes", "engine=fp32_zero1"]
    ).places
    shipped = conf_dir()
    assert places["train.steps"] == "conf/experiment/mine.yaml:7"
    assert places["optim.lr"] == "my.yaml:1"
    assert places["run.seed"] == places["data.lanes"] == "command line"
    assert places["model.init_std"] == "default"
    assert places["model.num_layers"].endswith("/model/quickstart.yaml:3")
    assert places["train.micro_batch_size"].startswith(str(shipped / "experiment" / "quickstart.yaml:"))
    assert places["engine.dtype"].startswith(str(shipped / "engine" / "fp32_zero1.yaml:"))
    assert (
        places["cluster.name"].startswith(str(shipped / "cluster" / "local.yaml"))
        or places["cluster.name"] == "default"
    )


def test_a_tilde_leaves_a_group_or_a_field_to_the_schema() -> None:
    whole = compose(["experiment=quickstart", "~optim"])
    assert whole.optim.beta2 == 0.95 and whole.optim.lr == 1.5e-3
    assert compose(["experiment=quickstart", "~report.prompt"]).report.prompt is None
    assert compose(["experiment=quickstart", "~checkpoint.every"]).checkpoint.every == 1000
    assert compose(["~experiment", "model=gpt3_125m"]) == compose(["experiment=null", "model=gpt3_125m"])
    assert lines_of("experiment=quickstart", "~model")[0].startswith("model=null: no model is chosen")
    assert lines_of("experiment=quickstart", "~train.steps") == ["train.steps=???: a value is required; an integer"]


@pytest.mark.parametrize(
    ("argument", "reason"),
    [
        ("hydra.run.dir=x", "a run's folder is run.dir/run.name"),
        ("hydra.sweep.dir=x", "a run's folder is run.dir/run.name"),
        ("hydra/launcher=joblib", "ranks are started by megalm itself"),
        ("hydra.launcher.n_jobs=2", "ranks are started by megalm itself"),
        ("hydra/sweeper=optuna", "-m runs every combination"),
        ("hydra/job_logging=none", "megalm writes its own logs"),
        ("hydra.job_logging.root.level=DEBUG", "megalm writes its own logs"),
        ("hydra.verbose=true", "megalm writes its own logs"),
        ("hydra.job.chdir=true", "a run stays in the working folder"),
        ("hydra.output_subdir=null", "the resolved config is RUN/config.yaml"),
        ("+hydra.x=1", "of Hydra's own settings megalm takes hydra.searchpath alone"),
        ("run.name=${now:%Y-%m-%d}", "the folder would be a different one at each start"),
        ("run.dir=runs/${ now:%H}", "the folder would be a different one at each start"),
        ("run.name=${hydra:job.num}", "Hydra runs no job here"),
        ("--config-name=mine", "an option of Hydra that megalm does not have; every run begins with"),
        ("--config-path=conf", "an option of Hydra that megalm does not have; every run begins with"),
    ],
)
def test_what_hydra_has_and_megalm_refuses_is_said_with_the_reason(argument: str, reason: str) -> None:
    (line,) = lines_of("experiment=quickstart", argument)
    assert reason in line


def test_a_time_in_the_folder_of_a_run_is_refused_in_files_too(write: Write) -> None:
    write("my.yaml", "experiment: quickstart\nrun.name: ${now:%Y}\n")
    (line,) = lines_of("--config=my.yaml")
    assert line.startswith("my.yaml:2: run.name=")
    write("conf/experiment/mine.yaml", EXPERIMENT.replace("name: mine", 'name: "${now:%Y}"'))
    (line,) = lines_of("experiment=mine")
    assert line.startswith("conf/experiment/mine.yaml:5: run.name=") and "a different one at each start" in line


def test_references_between_fields(write: Write) -> None:
    write("my.yaml", "experiment: quickstart\nrun.name: lr-${optim.lr}\nmodel.ffn_hidden_size: ${model.hidden_size}\n")
    config = compose(["--config=my.yaml", "run.seed=${model.num_layers}", "logging.wandb_group=${optim.lr}"])
    assert (config.run.name, config.model.ffn_hidden_size, config.run.seed) == ("lr-0.0015", 192, 6)
    assert config.logging.wandb_group == "0.0015"
    assert compose(["experiment=quickstart", "logging.wandb_notes=${now:%Y}"]).logging.wandb_notes.isdigit()  # type: ignore[union-attr]
    assert lines_of("experiment=quickstart", "run.seed=${model.layers}", "report.prompt=${") == [
        "run.seed=\"${model.layers}\": Interpolation key 'model.layers' not found; ${SECTION.FIELD}, such as "
        "${model.num_layers}, or text without ${",
        'report.prompt="${": not a reference that can be read; ${SECTION.FIELD}, such as ${model.num_layers}, or text '
        "without ${",
    ]


def source(**changes: object) -> Source:
    model = {"num_layers": 3, "hidden_size": 32, "num_heads": 2, "sequence_length": 64, "dropout": 0.2, "of_old": 1}
    return Source("runs/base/checkpoints/step-00000010", {**model, **changes})


def test_a_run_that_begins_with_another_has_its_model(write: Write) -> None:
    asked: list[object] = []

    def find(mapping: object) -> Source:
        asked.append(mapping)
        return source()

    made = composition(["checkpoint.init_from=runs/base", "model.dropout=0.1"], find)
    model = made.config.model
    assert (model.num_layers, model.hidden_size, model.sequence_length, model.dropout) == (3, 32, 64, 0.1)
    assert made.places["model.num_layers"] == "runs/base/checkpoints/step-00000010"
    assert made.places["model.dropout"] == "command line"
    assert made.notes == ("model          taken from runs/base/checkpoints/step-00000010",)
    assert asked


def test_the_model_of_an_experiment_gives_way_and_is_told(write: Write) -> None:
    write("conf/experiment/mine.yaml", EXPERIMENT + "model: {attention_dropout: 0.3}\n")
    made = composition(["experiment=mine", "checkpoint.finetune_from=runs/base"], lambda _: source())
    assert (made.config.model.num_layers, made.config.model.attention_dropout) == (3, 0.3)
    assert made.config.train.steps == 7
    (note,) = made.notes
    assert "not the experiment's model=quickstart: num_layers 6 → 3, hidden_size 192 → 32" in note


def test_a_model_that_is_named_is_not_replaced() -> None:
    found = composition(["model=quickstart", "checkpoint.init_from=runs/base"], lambda _: source())
    assert found.config.model.num_layers == 6 and found.notes == ()


def test_without_the_source_the_path_is_what_is_wrong() -> None:
    with pytest.raises(ConfigError) as caught:
        composition(["checkpoint.init_from=runs/typo"], lambda _: None)
    assert caught.value.lines[0].startswith("checkpoint.init_from=runs/typo: not a complete checkpoint of this machine")
