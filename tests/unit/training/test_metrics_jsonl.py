import json
import math
from dataclasses import asdict

import pytest

from megalm.errors import ConfigError, DataError
from megalm.ownership import owned
from megalm.runs.record import checkpoint_rows, cut_back, encode_row, read_metrics, step_rows, validation_rows
from megalm.training.callbacks.base import CheckpointMetrics, Outcome
from megalm.training.callbacks.metrics_jsonl import MetricsJsonl

CHECKPOINT = CheckpointMetrics(step=1, checkpoint="here", stall_seconds=0.1, write_seconds=2.0, gigabytes=1.5)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def write_run(context, steps, make_step, make_validation):
    log = MetricsJsonl()
    log.on_start(context)
    for step in steps:
        log.on_step(make_step(step))
        if step % 5 == 0:
            log.on_validation(make_validation(step))
    log.on_end(Outcome.DONE)
    log.close()


FIELDS = (
    "step samples tokens loss loss_tokens grad_norm lr loss_scale step_seconds tokens_per_second mfu "
    "data_seconds bubble_fraction memory_gib"
)


def test_a_step_row_has_exactly_the_promised_fields(make_step):
    assert " ".join(make_step(1).row()) == FIELDS


def test_terms_of_an_objective_appear_under_their_names_and_units_under_theirs(path, make_context, make_step):
    log = MetricsJsonl()
    log.on_start(make_context())
    log.on_step(make_step(1, terms={"z_loss": 0.125}, unit="pair"))
    log.on_end(Outcome.DONE)
    log.close()
    (row,) = step_rows(read_metrics(path))
    assert " ".join(row) == FIELDS.replace("loss_tokens", "loss_pairs") + " z_loss"
    assert (row["loss_pairs"], row["z_loss"]) == (500, 0.125)


def test_rows_come_back_bit_for_bit(path, make_context, make_step, make_validation):
    write_run(make_context(), range(1, 11), make_step, make_validation)
    rows = read_metrics(path)
    assert step_rows(rows) == [make_step(step).row() for step in range(1, 11)]
    assert validation_rows(rows) == [make_validation(step).row() for step in (5, 10)]


def test_a_row_is_in_the_file_before_the_next_step(path, make_context, make_step):
    log = MetricsJsonl()
    log.on_start(make_context())
    log.on_step(make_step(1))
    assert [row["step"] for row in read_metrics(path)] == [1]
    log.close()


def test_checkpoints_and_their_failures_are_rows(path, make_context, make_step):
    log = MetricsJsonl()
    log.on_start(make_context())
    log.on_step(make_step(1))
    log.on_checkpoint(CHECKPOINT)
    log.on_checkpoint_failed(2, "no room")
    log.close()
    rows = read_metrics(path)
    assert checkpoint_rows(rows) == [asdict(CHECKPOINT)]
    assert rows[-1] == {"step": 2, "checkpoint_error": "no room"}
    assert len(step_rows(rows)) == 1


def test_rows_that_a_full_disk_does_not_take_wait_for_room(path, make_context, make_step, capsys):
    log = MetricsJsonl()
    log.on_start(make_context())
    room = log._file
    with open("/dev/full", "ab", buffering=0) as full:  # noqa: PTH123 - a device
        log._file = full
        for step in (1, 2):
            log.on_step(make_step(step))
        log.on_checkpoint(CHECKPOINT)
        with pytest.raises(OSError, match="No space left"):
            log.on_end(Outcome.DONE)
    assert capsys.readouterr().err.count("rows wait in memory") == 1
    log._file = room
    log.on_step(make_step(3))
    log.on_end(Outcome.DONE)
    log.close()
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 1, 3]


def test_numbers_that_are_not_finite_are_standard_json(path):
    line = encode_row({"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": -math.inf})

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    assert json.loads(line, parse_constant=refuse)["loss"] == "NaN"
    path.write_text(line + "\n")
    (row,) = read_metrics(path)
    assert math.isnan(row["loss"])
    assert (row["grad_norm"], row["lr"]) == (math.inf, -math.inf)


def test_resume_drops_the_steps_that_are_taken_again(path, make_context, make_step, make_validation):
    write_run(make_context(), range(1, 11), make_step, make_validation)
    whole = path.read_bytes()
    write_run(make_context(start_step=7), range(8, 11), make_step, make_validation)
    assert path.read_bytes() == whole


def test_resume_keeps_the_validation_of_the_restored_step(path, make_context, make_step, make_validation):
    write_run(make_context(), range(1, 11), make_step, make_validation)
    cut_back(path, 5)
    assert [row["step"] for row in validation_rows(read_metrics(path))] == [5]


def test_a_torn_last_line_is_left_out_and_cut_off(path, make_context, make_step, make_validation):
    write_run(make_context(), range(1, 4), make_step, make_validation)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 4, "sam')
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]
    write_run(make_context(start_step=3), [], make_step, make_validation)
    assert path.read_bytes() == whole


def test_nothing_is_rewritten_when_nothing_is_cut(path, make_context, make_step, make_validation):
    write_run(make_context(), range(1, 4), make_step, make_validation)
    inode = path.stat().st_ino
    cut_back(path, 3)
    assert path.stat().st_ino == inode


def test_a_damaged_line_in_the_middle_is_named(path):
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo\n{"step": 3, "loss": 2.0}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: not a row"):
        read_metrics(path)
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: not a row"):
        cut_back(path, 1)


def test_a_missing_file_is_named(path):
    with pytest.raises(DataError, match="cannot be read"):
        read_metrics(path)


def test_a_run_that_was_passed_over_adds_no_row(make_context, make_step, tmp_path, path):
    with owned(tmp_path / "owner.lock", "run.name=try1", "wait") as ownership:
        log = MetricsJsonl(ownership.claim)
        log.on_start(make_context())
        log.on_step(make_step(1))
        before = path.read_bytes()
        (tmp_path / "owner.lock" / ownership.claim.token).unlink()
        with pytest.raises(ConfigError, match="was removed"):
            log.on_step(make_step(2))
        log.on_end(Outcome.FAILED)
        log.close()
        with pytest.raises(ConfigError, match="was removed"):
            MetricsJsonl(ownership.claim).on_start(make_context(start_step=0))
    assert path.read_bytes() == before
