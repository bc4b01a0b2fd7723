import threading
import time
from dataclasses import replace

import pytest

from megalm.config.schema import Logging
from megalm.training.callbacks import wandb as module
from megalm.training.callbacks.base import CheckpointMetrics, Outcome
from megalm.training.callbacks.wandb import WandbLog, resolve_mode, stored_run_id


class FakeRun:
    def __init__(self):
        self.rows = []
        self.exit_code = None

    def log(self, row, step):
        self.rows.append((step, row))

    def finish(self, exit_code):
        self.exit_code = exit_code


@pytest.fixture
def run(monkeypatch):
    run = FakeRun()
    monkeypatch.setattr(module, "_start_run", lambda *_: run)
    return run


def test_every_row_arrives_in_order(run, make_context, make_step, make_validation):
    log = WandbLog("offline")
    log.on_start(make_context())
    for step in range(1, 4):
        log.on_step(make_step(step))
    log.on_validation(make_validation(3))
    log.on_checkpoint(CheckpointMetrics(step=2, checkpoint="here", stall_seconds=0.5, write_seconds=2.0, gigabytes=1.5))
    log.on_end(Outcome.DONE)
    log.close()
    assert [step for step, _ in run.rows] == [1, 2, 3, 3, 3], "W&B's steps never go back"
    assert run.rows[4][1]["checkpoint/stall_seconds"] == 0.5
    assert run.rows[0][1]["loss"] == make_step(1).loss
    assert "mfu" not in run.rows[0][1]
    assert run.rows[3][1]["val_perplexity"] == 7.389
    assert run.exit_code == 0


def test_a_run_that_failed_is_shown_as_failed(run, make_context):
    log = WandbLog("offline")
    log.on_start(make_context())
    log.on_end(Outcome.DIVERGED)
    log.close()
    assert run.exit_code == 1


def test_training_never_waits_for_a_slow_start(monkeypatch, make_context, make_step, capsys):
    release, run = threading.Event(), FakeRun()

    def start(*_):
        release.wait(10)
        return run

    monkeypatch.setattr(module, "_start_run", start)
    log = WandbLog("offline", queue_size=2)
    log.on_start(make_context())
    for step in range(1, 6):
        log.on_step(make_step(step))  # would never return if it waited
    assert run.rows == []
    release.set()
    log.close()
    assert [step for step, _ in run.rows] == [1, 2]
    assert capsys.readouterr().err == ("warning: W&B: it is too slow and misses rows; metrics.jsonl has them all\n")


def test_a_failing_start_is_one_line(monkeypatch, make_context, make_step, capsys):
    def start(*_):
        raise OSError("no route to host\nand more")

    monkeypatch.setattr(module, "_start_run", start)
    log = WandbLog("online")
    log.on_start(make_context())
    log.on_step(make_step(1))
    log.on_end(Outcome.DONE)
    log.close()
    assert capsys.readouterr().err == (
        "warning: W&B: it is off for this run, which goes on without it (OSError: no route to host)\n"
    )


def test_disabled_starts_nothing(monkeypatch, make_context, make_step, tmp_path):
    monkeypatch.setattr(module, "_start_run", lambda *_: pytest.fail("started"))
    log = WandbLog("disabled")
    log.on_start(make_context())
    log.on_step(make_step(1))
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_the_id_is_made_once_and_is_unique(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = stored_run_id(tmp_path / "a")
    assert stored_run_id(tmp_path / "a") == first
    assert stored_run_id(tmp_path / "b") != first


def test_auto_is_online_only_where_a_key_is_configured(tmp_path):
    netrc = tmp_path / "netrc"
    without = {"NETRC": str(netrc)}
    assert resolve_mode("auto", without) == "offline"
    assert resolve_mode("auto", without | {"WANDB_API_KEY": "k"}) == "online"
    netrc.write_text("machine api.wandb.ai\n  login user\n  password k\n")
    netrc.chmod(0o600)
    assert resolve_mode("auto", without) == "online"
    assert resolve_mode("auto", without | {"WANDB_BASE_URL": "https://wandb.example.org"}) == "offline"
    assert resolve_mode("auto", without | {"WANDB_MODE": "disabled"}) == "disabled"
    assert resolve_mode("offline", {"WANDB_API_KEY": "k"}) == "offline"


def test_the_real_client_writes_offline_and_says_nothing(make_context, make_step, tmp_path, capfd):
    log = WandbLog("offline")
    log.on_start(make_context())
    log.on_step(make_step(1))
    log.on_end(Outcome.DONE)
    log.close()
    run_id = (tmp_path / "wandb_id").read_text().strip()
    (record,) = (tmp_path / "wandb").glob(f"offline-run-*/run-{run_id}.wandb")
    deadline = time.monotonic() + 30  # the client's own process writes it
    while b"grad_norm" not in record.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert b"grad_norm" in record.read_bytes()
    assert capfd.readouterr() == ("", "")


def test_wandb_gets_the_names_of_the_config(monkeypatch, make_context):
    import wandb

    context = make_context()
    names = Logging(
        wandb_project="p", wandb_entity="team", wandb_group="a sweep", wandb_tags=("a", "b c"), wandb_notes="it's 1"
    )
    context = replace(context, config=replace(context.config, logging=names))
    asked = {}
    monkeypatch.setattr(wandb, "setup", lambda **_: None)
    monkeypatch.setattr(wandb, "init", lambda **given: asked.update(given))
    module._start_run(context.config, context.run_dir, "id12", "offline")
    expected = {"project": "p", "entity": "team", "group": "a sweep", "tags": ("a", "b c"), "notes": "it's 1"}
    assert {name: asked[name] for name in expected} == expected
    assert asked["config"]["logging"]["wandb_tags"] == ["a", "b c"]
