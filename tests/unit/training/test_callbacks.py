import pytest

from megalm.training.callbacks.base import Callback, CallbackList, Outcome


class Recorder(Callback):
    def __init__(self, log, name):
        self.log = log
        self.label = name

    def on_step(self, metrics):
        self.log.append((self.label, "step", metrics.step))

    def on_end(self, outcome):
        self.log.append((self.label, "end", outcome))

    def close(self):
        self.log.append((self.label, "close"))


class Broken(Callback):
    def __init__(self):
        self.closed = 0

    def on_step(self, metrics):
        raise OSError(f"no space left\nfor step {metrics.step}")

    def close(self):
        self.closed += 1


class BrokenTruth(Broken):
    essential = True


def test_every_callback_gets_every_event_in_order(make_step):
    log = []
    callbacks = CallbackList([Recorder(log, "a"), Recorder(log, "b")])
    callbacks.on_step(make_step(1))
    callbacks.on_end(Outcome.DONE)
    callbacks.close()
    assert log == [
        ("a", "step", 1),
        ("b", "step", 1),
        ("a", "end", "done"),
        ("b", "end", "done"),
        ("b", "close"),
        ("a", "close"),
    ]


def test_a_failing_logger_warns_once_and_is_dropped(make_step, capsys):
    log, broken = [], Broken()
    callbacks = CallbackList([broken, Recorder(log, "after")])
    callbacks.on_step(make_step(1))
    callbacks.on_step(make_step(2))
    callbacks.close()
    assert capsys.readouterr().err == (
        "warning: Broken failed in on_step and is off from here on: OSError: no space left\n"
    )
    assert log == [("after", "step", 1), ("after", "step", 2), ("after", "close")]
    assert broken.closed == 1


def test_a_failing_record_stops_the_run(make_step):
    callbacks = CallbackList([BrokenTruth()])
    with pytest.raises(OSError, match="no space left"):
        callbacks.on_step(make_step(1))


def test_everything_is_closed_even_if_the_record_cannot_be(make_step):
    class Unclosable(Callback):
        essential = True

        def close(self):
            raise OSError("disk gone")

    log = []
    callbacks = CallbackList([Recorder(log, "a"), Unclosable(), Recorder(log, "b")])
    with pytest.raises(OSError, match="disk gone"):
        callbacks.close()
    assert log == [("b", "close"), ("a", "close")]
