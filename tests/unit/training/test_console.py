import io
import math
from dataclasses import replace

import pytest

from megalm.training.callbacks.base import CheckpointMetrics, Outcome
from megalm.training.callbacks.console import ConsoleLog, Pace
from megalm.training.callbacks.words import (
    banner,
    checkpoint_line,
    end_line,
    format_count,
    format_duration,
    step_line,
    validation_line,
)

CHECKPOINT = CheckpointMetrics(
    step=25,
    checkpoint="runs/try1/checkpoints/step-00000025",
    stall_seconds=0.004,
    write_seconds=1.2,
    gigabytes=0.1,
)


def test_a_save_that_waited_for_the_one_before_says_so():
    waited = replace(CHECKPOINT, stall_seconds=12.5, waited_seconds=12.0)
    assert "(stall 12.5 s of which 12.0 s until the one before was written, written in 1.2 s)" in checkpoint_line(
        waited, 25
    )
    assert "(stall 4 ms, written in 1.2 s)" in checkpoint_line(replace(CHECKPOINT, waited_seconds=0.003), 25)


def run(console, context, make_step, make_validation, last):
    console.on_start(context)
    for step in range(context.start_step + 1, last + 1):
        console.on_step(make_step(step))
    console.on_validation(make_validation(last))
    console.on_checkpoint(CHECKPOINT)
    console.on_checkpoint_failed(24, "checkpoint of step 24 was not saved: no space")
    console.on_end(Outcome.DONE)
    console.close()


def test_a_log_file_gets_a_line_per_interval(make_context, make_step, make_validation):
    stream = io.StringIO()
    run(ConsoleLog(10, stream=stream), make_context(total_steps=25), make_step, make_validation, 25)
    lines = stream.getvalue().splitlines()
    assert [line.split("/")[0] for line in lines if "loss" in line and "validation" not in line] == [
        "step  1",
        "step 10",
        "step 20",
        "step 25",
    ]
    assert "\x1b" not in stream.getvalue()
    assert "step 25/25  checkpoint runs/try1/checkpoints/step-00000025 (stall 4 ms, written in 1.2 s)" in lines
    assert any("step 24 was not saved: no space; training goes on" in line for line in lines)
    assert max(len(line) for line in lines if "not saved" not in line) <= 120


def test_a_terminal_gets_a_bar_with_validations_above_it(make_context, make_step, make_validation):
    stream = io.StringIO()
    console = ConsoleLog(10, stream=stream, interactive=True)
    run(console, make_context(total_steps=25), make_step, make_validation, 25)
    text = stream.getvalue()
    assert "25/25" in text
    assert "validation loss 2.0000  perplexity 7.39" in text
    assert "step  1/25" not in text


def test_a_terminal_that_goes_leaves_lines_for_the_log(make_context, make_step):
    class Terminal(io.StringIO):
        lost = None

    stream = Terminal()
    console = ConsoleLog(1, stream=stream, interactive=True)
    console.on_start(make_context())
    console.on_step(make_step(1))
    stream.lost = "Input/output error"
    console.on_step(make_step(2))
    console.close()
    assert "step   1/100" not in stream.getvalue()
    assert "step   2/100  loss 2.8333" in stream.getvalue()


def test_the_banner_says_what_is_trained_and_where_it_resumes(make_context):
    lines = banner(make_context())
    assert lines == [
        "megalm   try1: GPT, 1.46M parameters (2 layers, hidden 32, 2 heads), fp32",
        "layout   tp2·pp2 (4 ranks) on CPU, ZeRO-1",
        "batch    8 x 64 tokens; 100 steps = 51.2K tokens of data/quickstart",
        f"output   {make_context().run_dir}",
    ]
    resumed = banner(make_context(start_step=40, loaded="resume, step 40: weights"))
    assert resumed[-1] == "loaded   resume, step 40: weights"


def test_numbers_that_are_not_finite_stand_out(make_step, make_validation):
    line = step_line(make_step(3, loss=math.nan, grad_norm=math.inf), 10, math.nan)
    assert "loss NAN  grad norm INF" in line
    assert line.endswith("ETA ?")
    assert "perplexity INF" in validation_line(make_validation(3, 1e6, math.inf), 10)


def test_mfu_is_shown_where_it_is_known(make_step):
    assert "MFU 41.5%" in step_line(make_step(3, mfu=0.415), 10, 1.0)
    assert "MFU" not in step_line(make_step(3), 10, 1.0)


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        (Outcome.DONE, "done     100 of 100 steps in 1 min 30 s"),
        (Outcome.INTERRUPTED, "interrupted and saved after 100 of 100 steps; the same command continues it"),
        (Outcome.DIVERGED, "diverged after 100 of 100 steps"),
    ],
)
def test_the_end_is_explained(make_step, outcome, expected):
    assert end_line(outcome, make_step(100), 0, 100, 90.0) == expected


def test_a_run_that_was_already_done_says_so():
    assert end_line(Outcome.DONE, None, 100, 100, 0.1) == "nothing left to train: 100 of 100 steps are done"


def test_the_slow_first_step_does_not_spoil_the_estimate():
    now = [0.0]
    pace = Pace(lambda: now[0])
    assert math.isnan(pace.remaining_seconds)
    now[0] += 300
    pace.step(99, step_seconds=50.0)
    assert pace.remaining_seconds == 99 * 50
    for left in range(98, 88, -1):
        now[0] += 2
        pace.step(left, step_seconds=1.5)
    assert pace.remaining_seconds == pytest.approx(89 * 2)


@pytest.mark.parametrize(
    ("value", "text"), [(950, "950"), (999.7, "1K"), (12_345, "12.3K"), (1_463_296, "1.46M"), (174.6e9, "175B")]
)
def test_counts(value, text):
    assert format_count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.012, "12 ms"), (3.44, "3.4 s"), (306, "5 min 06 s"), (25_680, "7 h 08 min"), (183_600, "2 d 03 h")],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text
