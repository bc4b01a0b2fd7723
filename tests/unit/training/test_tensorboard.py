import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megalm.training.callbacks.base import CheckpointMetrics
from megalm.training.callbacks.tensorboard import TensorBoardLog


def scalars(folder, tag):
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_rows_are_written_and_the_redone_steps_hidden(make_context, make_step, make_validation, tmp_path):
    for start, last in ((0, 5), (3, 6)):
        log = TensorBoardLog()
        log.on_start(make_context(start_step=start))
        for step in range(start + 1, last + 1):
            log.on_step(make_step(step))
        log.on_validation(make_validation(last))
        log.close()
    losses = scalars(tmp_path / "tensorboard", "train/loss")
    assert [step for step, _ in losses] == [1, 2, 3, 4, 5, 6]
    assert losses[5][1] == pytest.approx(make_step(6).loss)
    assert scalars(tmp_path / "tensorboard", "validation/perplexity")[-1] == (6, pytest.approx(7.389))


def test_what_a_checkpoint_cost_is_written_at_its_step(make_context, tmp_path):
    log = TensorBoardLog()
    log.on_start(make_context())
    log.on_checkpoint(CheckpointMetrics(step=4, checkpoint="here", stall_seconds=0.5, write_seconds=2.0, gigabytes=1.5))
    log.close()
    assert scalars(tmp_path / "tensorboard", "checkpoint/stall_seconds") == [(4, 0.5)]


def test_it_is_quiet_about_numbers_that_are_not_finite(make_context, make_step, capfd):
    log = TensorBoardLog()
    log.on_start(make_context())
    log.on_step(make_step(1, loss=float("nan")))
    log.close()
    assert capfd.readouterr() == ("", "")
