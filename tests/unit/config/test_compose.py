from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings

from megalm.config.check import violations
from megalm.config.compose import CONFIG_FILE, compose, conf_dir, group_options, load_run_config, save_config
from megalm.config.job import planned_world_size_of
from megalm.config.parse import config_from_dict, config_to_dict, field_paths
from megalm.config.search_path import SearchPath
from megalm.errors import ConfigError
from megalm.models.counts import parameter_count
from megalm.plan.hardware import device_violations, devices
from tests.unit.config.random_invalid import InvalidConfig, random_invalid

EXPERIMENTS = group_options()["experiment"]
MODELS = group_options()["model"]
OPTIONS = [(group, name) for group, names in group_options().items() for name in names]

# Brown et al. 2020, table 2.1: tokens per batch (millions) and learning rate.
TABLE_2_1 = {
    "125m": (0.5, 6.0e-4),
    "350m": (0.5, 3.0e-4),
    "760m": (0.5, 2.5e-4),
    "1_3b": (1.0, 2.0e-4),
    "2_7b": (1.0, 1.6e-4),
    "6_7b": (2.0, 1.2e-4),
    "13b": (2.0, 1.0e-4),
    "175b": (3.2, 0.6e-4),
}


def errors_of(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        compose(list(overrides))
    assert all(re.fullmatch(r"[~\w.@]+=?.*: .+; .+", line) for line in caught.value.lines), caught.value.lines
    assert "HYDRA_FULL_ERROR" not in str(caught.value)
    return caught.value.lines


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_is_valid_on_its_own_ranks(name: str) -> None:
    config = compose([f"experiment={name}"])
    assert violations(config, planned_world_size_of(config)) == []
    assert device_violations(config) == []
    assert config.run.name == name


@pytest.mark.parametrize(("group", "name"), OPTIONS)
def test_every_option_composes_and_says_what_it_is_for(group: str, name: str) -> None:
    # An encoder and what it learns belong together: neither stands alone.
    encoder = name in ("quickstart_bert", "mlm")
    partner = "objective=mlm" if encoder else "objective=clm"
    model = "model=quickstart_bert" if encoder else "model=gpt3_175b"
    choices = {"model": model, "objective": partner} | {group: f"{group}={name}"}
    config = compose([f"experiment={name}"] if group == "experiment" else list(choices.values()))
    assert violations(config, planned_world_size_of(config)) == []
    assert (conf_dir() / group / f"{name}.yaml").read_text(encoding="utf-8").startswith("# ")


def test_every_yaml_file_is_an_option() -> None:
    files = {path.relative_to(conf_dir()).as_posix() for path in conf_dir().rglob("*") if path.is_file()}
    tasks = {f"task/{name}.yaml" for name in SearchPath.of().tasks()}  # which are no options of a run
    assert files == {CONFIG_FILE, *(f"{group}/{name}.yaml" for group, name in OPTIONS), *tasks}
    assert len(tasks) == 7


@pytest.mark.parametrize("name", MODELS)
def test_model_files_state_their_parameters(name: str) -> None:
    first_line = (conf_dir() / "model" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    stated = re.match(r"# Parameters: ([\d,]+) \(", first_line)
    assert stated
    counted = parameter_count(compose([f"model={name}"]).model, vocab_size=4096).total
    assert int(stated[1].replace(",", "")) == counted


@pytest.mark.parametrize("size", TABLE_2_1)
def test_gpt3_experiments_follow_the_paper(size: str) -> None:
    config = compose([f"experiment=gpt3_{size}"])
    millions, lr = TABLE_2_1[size]
    batch_tokens = config.train.global_batch_size * config.model.sequence_length
    assert batch_tokens == pytest.approx(millions * 1e6, rel=0.05)
    assert config.optim.lr == lr
    assert config.train.steps == -(-300_000_000_000 // batch_tokens)
    assert (config.optim.warmup_tokens, config.optim.decay_tokens) == (375_000_000, 260_000_000_000)
    text = (conf_dir() / "experiment" / f"gpt3_{size}.yaml").read_text(encoding="utf-8")
    parallel = config.parallel
    dp = config.cluster.gpus // (parallel.tp * parallel.pp)
    assert f"{config.cluster.gpus} GPUs = tp {parallel.tp} x pp {parallel.pp} x dp {dp}; " in text
    micro_batches = config.train.global_batch_size // (dp * config.train.micro_batch_size)
    assert f"; {micro_batches} micro-batches of {config.train.micro_batch_size} per" in text
    assert f"= {batch_tokens:,} tokens" in text and f"= {config.train.steps:,} (" in text


def test_clusters_name_known_devices() -> None:
    for name in group_options()["cluster"]:
        gpu = compose(["model=gpt3_125m", f"cluster={name}"]).cluster.gpu
        assert gpu is None or gpu in devices()


def test_the_quickstart_is_3d_parallel_on_four_ranks() -> None:
    config = compose(["experiment=quickstart"])
    assert planned_world_size_of(config) == 4
    assert (config.parallel.tp, config.parallel.pp) == (2, 2)
    assert config.report.prompt == "def main("


def test_every_field_can_be_overridden_without_a_plus() -> None:
    base = config_to_dict(compose(["experiment=quickstart"]))
    overrides = []
    for path, kind in field_paths().items():
        section, name = path.split(".")
        value = base[section][name]
        text = (
            "null" if value is None else f"'{value}'" if kind is str or isinstance(value, str) else str(value).lower()
        )
        overrides.append(f"{path}={text}")
    assert config_to_dict(compose(["experiment=quickstart", *overrides])) == base
    assert compose(["model=gpt3_125m", "cluster.gpus=1024"]).cluster.gpus == 1024


def test_fields_win_over_experiments_and_experiments_over_groups() -> None:
    config = compose(["parallel.tp=4", "experiment=gpt3_13b", "model=gpt3_125m", "train.steps=1e3"])
    assert config.parallel.tp == 4
    assert config.model.num_layers == 12
    assert config.optim.lr == 1.0e-4
    assert config.train.steps == 1000


def test_text_that_looks_like_a_number_stays_text() -> None:
    assert compose(["experiment=quickstart", "run.name=007"]).run.name == "007"
    assert compose(["experiment=quickstart", "run.name=1e3"]).run.name == "1e3"
    assert compose(["experiment=quickstart", "report.prompt=null"]).report.prompt is None


def test_nothing_chosen_lists_the_choices() -> None:
    (line,) = errors_of()
    assert line.startswith("model=null: no model is chosen; experiment=")
    assert all(name in line for name in [*EXPERIMENTS, *MODELS])


def test_all_bad_overrides_are_reported_at_once_with_what_was_meant() -> None:
    assert errors_of(
        "model=gpt3_125n",
        "model.num_layer=3",
        "modle=gpt3_125m",
        "+optim.learning_rate=1",
        "~modell",
        "~model=gpt3_125m",
        "train.steps=1,2",
        "bare",
        "optim.lr=fast",
        "parallel.tp=0",
        "engine.dtype=fp8",
    ) == [
        "model=gpt3_125n: there is no such option; did you mean model=gpt3_125m, gpt3_175b or gpt3_13b?",
        "model.num_layer=3: there is no such field; did you mean model.num_layers?",
        "modle=gpt3_125m: there is no such group or section; did you mean model?",
        "optim.learning_rate=1: there is no such field; the fields of optim are lr, beta1, beta2, epsilon, "
        "weight_decay, clip_grad_norm, schedule, warmup_tokens, decay_tokens, cooldown_tokens, cooldown, "
        "min_lr_ratio and rewarm_tokens",
        "override=~modell: there is no such group or section; did you mean model?",
        'override="~model=gpt3_125m": a deletion has no value; ~model',
        'train.steps="1,2": several values, and a run has one; one value; megalm train -m train.steps=1,2 trains a '
        "run with each",
        "override=bare: not an override; field=value, such as train.steps=200",
        "optim.lr=fast: this is text; a finite number",
        "parallel.tp=0: out of range; at least 1 and at most 2147483647",
        "engine.dtype=fp8: there is no such choice; engine.dtype=bf16, fp16 or fp32",
    ]


@pytest.mark.parametrize(
    "override",
    [
        "report.prompt=${nothing}",
        "model={num_layers:",
        "experiment=[quickstart]",
        "hydra.run.dir=x",
        "=",
        "model@x=gpt3_125m",
    ],
)
def test_odd_overrides_are_refused_in_one_line(override: str) -> None:
    assert len(errors_of("experiment=quickstart", override)) == 1


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(random_invalid())
def test_invalid_values_survive_the_command_line(invalid: InvalidConfig) -> None:
    config = compose(invalid.overrides)
    for path, value in invalid.values.items():
        section, name = path.split(".")
        assert getattr(getattr(config, section), name) == value


def test_configs_survive_the_disk(tmp_path: Path) -> None:
    config = compose(["experiment=quickstart", "optim.lr=6e-05", "report.prompt='äß\\\"'"])
    save_config(config, tmp_path / CONFIG_FILE)
    assert load_run_config(tmp_path) == config
    assert config_from_dict(yaml.safe_load((tmp_path / CONFIG_FILE).read_text(encoding="utf-8"))) == config
    changed = load_run_config(tmp_path, ["parallel.tp=1", "run.name=9"])
    assert changed.parallel.tp == 1 and changed.run.name == "9"
    assert changed.model == config.model


def test_a_saved_run_refuses_groups_and_misspellings(tmp_path: Path) -> None:
    save_config(compose(["experiment=quickstart"]), tmp_path / CONFIG_FILE)
    with pytest.raises(ConfigError) as caught:
        load_run_config(tmp_path, ["model=gpt3_125m", "parallel.pt=1"])
    section, misspelt = caught.value.lines
    assert section.startswith("model=gpt3_125m: a whole section; set its fields: model.num_layers, ")
    assert misspelt == "parallel.pt=1: there is no such field; did you mean parallel.tp, parallel.pp or parallel.cp?"


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no config\.yaml; the folder of a run"):
        load_run_config(tmp_path)
    with pytest.raises(ConfigError, match=r"quickstat: no such folder; the folder of a run"):
        load_run_config(tmp_path / "quickstat")
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"a model of Hugging Face's; megalm convert --from hf"):
        load_run_config(tmp_path)
    (tmp_path / CONFIG_FILE).write_text("a: [", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"cannot read config\.yaml"):
        load_run_config(tmp_path)
    (tmp_path / CONFIG_FILE).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"cannot read config\.yaml"):
        load_run_config(tmp_path)


def test_composing_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra

    monkeypatch.chdir(tmp_path)
    compose(["experiment=quickstart"])
    assert not GlobalHydra.instance().is_initialized()
    assert "schema.yaml" not in ConfigStore.instance().repo
    assert Path.cwd() == tmp_path and not list(tmp_path.iterdir())


def test_composing_inside_a_hydra_application_leaves_it_alone(tmp_path: Path) -> None:
    import hydra

    (tmp_path / "outer.yaml").write_text("answer: 42\n", encoding="utf-8")
    with hydra.initialize_config_dir(str(tmp_path), version_base="1.3"):
        compose(["experiment=quickstart"])
        assert hydra.compose("outer").answer == 42


def test_an_installed_package_composes_from_its_own_conf(tmp_path: Path) -> None:
    package = tmp_path / "megalm"
    shutil.copytree(conf_dir().parent / "megalm", package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(conf_dir(), package / "conf")
    program = (
        "from megalm.config.compose import compose, conf_dir; "
        "compose(['experiment=quickstart']); print(conf_dir(), end='')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        timeout=60,
    )
    assert done.stdout == str(package / "conf")


def test_composing_needs_no_torch_and_under_a_second() -> None:
    program = (
        "import sys, time; start = time.perf_counter()\n"
        "from megalm.config.compose import compose\n"
        "compose(['experiment=gpt3_175b'])\n"
        "assert 'torch' not in sys.modules\n"
        "print(time.perf_counter() - start)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert float(done.stdout) < 5  # about 0.3 s; the margin is for a machine that is busy with other tests


@pytest.fixture
def own_conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with an experiment of one's own, which sets fields that groups set too."""
    folder = tmp_path / "conf"
    (folder / "experiment").mkdir(parents=True)
    (folder / "experiment" / "mine.yaml").write_text(
        "# @package _global_\n"
        "defaults:\n  - override /model: quickstart\n"
        "parallel: {tp: 2, sequence_parallel: true}\n"
        "engine: {dtype: fp32, recompute: full}\n"
        "model: {num_layers: 2}\n"
        "optim: {lr: 5.0e-5, schedule: linear}\n"
        "data: {path: data/mine, lanes: 2}\n"
        "objective: {mask_probability: 0.3}\n"
        "checkpoint: {every: 10}\n"
        "logging: {wandb: offline}\n"
        "cluster: {gpu: h200}\n"
    )
    monkeypatch.chdir(tmp_path)
    return folder


def test_an_option_typed_after_an_experiment_beats_the_values_in_its_file(own_conf: Path) -> None:
    typed = ["parallel=tp4", "engine=bf16_zero1", "model=gpt3_125m", "optim=adamw_wsd", "data=blocks", "objective=mlm"]
    typed += ["checkpoint=final_only", "logging=plain", "cluster=a100_80gb"]
    config = compose(["experiment=mine", *typed])
    assert (config.parallel.tp, config.parallel.sequence_parallel) == (4, True)
    assert (config.engine.dtype, config.engine.recompute) == ("bf16", "full"), "what the option leaves open stays"
    assert config.model.num_layers == 12
    assert (config.optim.schedule, config.optim.lr) == ("wsd", 5e-5)
    assert (config.data.path, config.data.lanes) == (("data/corpus",), 4)
    assert config.objective.mask_probability == 0.15
    assert (config.checkpoint.every, config.logging.wandb, config.cluster.gpu) == (0, "disabled", "a100_80gb")
    alone = compose(["experiment=mine"])
    assert (alone.parallel.tp, alone.model.num_layers, alone.checkpoint.every) == (2, 2, 10)
    assert compose(["experiment=mine", "parallel=single"]).parallel.sequence_parallel is False, "a layout is whole"


def test_a_field_typed_beats_an_experiment_anywhere_and_an_option_typed_before_it(own_conf: Path) -> None:
    for overrides in (["experiment=mine", "parallel=tp4", "parallel.tp=8"], ["parallel.tp=8", "experiment=mine"]):
        assert compose(overrides).parallel.tp == 8


def test_what_is_typed_last_is_never_silently_beaten(own_conf: Path) -> None:
    with pytest.raises(ConfigError) as error:
        compose(["parallel=tp4", "checkpoint=final_only", "experiment=mine"])
    assert str(error.value).splitlines() == [
        "parallel=tp4: experiment=mine, typed after it, sets parallel.tp=2; type parallel=tp4 after experiment=mine, "
        "where it wins, or leave it out",
        "checkpoint=final_only: experiment=mine, typed after it, sets checkpoint.every=10; type checkpoint=final_only "
        "after experiment=mine, where it wins, or leave it out",
    ]
    with pytest.raises(ConfigError) as error:
        compose(["experiment=mine", "parallel.tp=2", "parallel=tp4"])
    assert str(error.value) == (
        "parallel.tp=2: parallel=tp4, typed after it, sets parallel.tp=4; type parallel.tp=2 after parallel=tp4, where "
        "it wins, or leave it out"
    )
    assert compose(["parallel=tp2", "experiment=mine", "parallel=tp4"]).parallel.tp == 4, "the last of two"


@pytest.mark.parametrize("experiment", ["quickstart", "gpt3_175b"])
def test_every_option_is_what_it_says_after_an_experiment(experiment: str) -> None:
    """One composition for all groups: of each the option that the experiment does not choose."""
    chosen = compose([f"experiment={experiment}"])
    typed = ["parallel=tp2_pp2_sp", "checkpoint=final_only", "engine=fp32_zero0", "optim=adamw_linear", "logging=plain"]
    config = compose([f"experiment={experiment}", *typed])
    parallel, optim = config.parallel, config.optim
    assert (parallel.tp, parallel.pp, parallel.virtual_stages, parallel.schedule) == (2, 2, 1, "1f1b")
    assert (config.checkpoint.every, config.checkpoint.resume) == (0, "never")
    assert (config.engine.dtype, config.engine.zero_stage) == ("fp32", 0)
    assert (optim.schedule, optim.min_lr_ratio) == ("linear", 0.0)
    assert (optim.lr, optim.warmup_tokens) == (chosen.optim.lr, chosen.optim.warmup_tokens), "the experiment's own"
