import math

import pytest

from megalm.runs.loss_curve import interpolate, plot_loss, smooth


def rows(steps):
    made = []
    for step in range(1, steps + 1):
        made.append({"step": step, "tokens": 512 * step, "loss": 2 + 6 / step if step != 3 else math.nan})
        if step % 10 == 0:
            made.append({"step": step, "tokens": 512 * step, "val_loss": 2 + 7 / step, "val_perplexity": 9.0})
    return made


@pytest.mark.parametrize(("steps", "name"), [(1, "try1"), (20, "a$b$ _{ 训练"), (120, "50% <b>")])
def test_a_picture_is_drawn_without_a_word(tmp_path, capfd, recwarn, steps, name):
    path = tmp_path / "loss.png"
    plot_loss(rows(steps), path, run_name=name)
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    assert (int.from_bytes(header[16:20]), int.from_bytes(header[20:24])) == (1280, 720)
    assert [file.name for file in tmp_path.iterdir()] == ["loss.png"]
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


def test_a_run_without_steps_has_no_curve(tmp_path):
    with pytest.raises(ValueError, match="no training step"):
        plot_loss([], tmp_path / "loss.png", run_name="try1")


def test_smoothing_is_centred_and_leaves_out_what_is_not_finite():
    assert smooth([1.0, 2.0, 3.0, 4.0, 5.0], 3) == [1.5, 2.0, 3.0, 4.0, 4.5]
    assert smooth([1.0, math.nan, 3.0], 3) == [1.0, 2.0, 3.0]
    assert smooth([1.0, 2.0], 1) == [1.0, 2.0]
    assert math.isnan(smooth([math.inf], 3)[0])


def test_the_axis_of_steps_follows_the_record_where_batches_differ():
    """Two steps of 100 tokens and two of 50: a share of the tokens is not the same share of the steps."""
    tokens, steps = [0, 100, 200, 250, 300], [0, 1, 2, 3, 4]
    assert [float(interpolate(seen, tokens, steps)) for seen in (50, 200, 275, 300, 330)] == [0.5, 2, 3.5, 4, 4.4]
    assert float(interpolate(3.5, steps, tokens)) == 275
