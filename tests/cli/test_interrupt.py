"""A signal ends a command behind the unit it is in; the same command then goes on."""

import os
import signal
import threading

import pytest

from rankine import pipeline
from rankine.cli.interrupt import SIGNALS, StoppedError, between_units


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_it_stops_between_units_and_puts_the_handlers_back(number, code):
    old = [signal.getsignal(n) for n in SIGNALS]
    reached = []

    def work():
        with between_units() as check:
            check()
            os.kill(os.getpid(), number)
            reached.append("end of the unit")
            check()

    with pytest.raises(StoppedError) as stopped:
        work()
    assert reached
    assert stopped.value.exit_code == code
    assert [signal.getsignal(n) for n in SIGNALS] == old


def test_a_second_signal_does_not_wait():
    reached = []

    def work():
        with between_units():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            reached.append("end of the unit")

    with pytest.raises(StoppedError):
        work()
    assert not reached


def test_one_that_comes_in_the_last_unit_counts():
    with pytest.raises(StoppedError), between_units():
        os.kill(os.getpid(), signal.SIGINT)


def test_other_threads_are_left_alone():
    found = []

    def work():
        with between_units() as check:
            check()
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGINT)]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_command_says_how_to_go_on(rankine, tiny, text, tmp_path, monkeypatch, number, code):
    offer = pipeline.offer

    def interrupted(stage):
        os.kill(os.getpid(), number)
        offer(stage)

    output = tmp_path / "out"
    command = ["compress", tiny, "--method", "kfac_svd", "--keep", "0.6", "-o", output]
    command += ["--calibration", text, "--evaluation", text, "--tokens", "4x16"]
    command += ["--eval-tokens", "64"]
    monkeypatch.setattr(pipeline, "offer", interrupted)
    ran = rankine(*command, "--fresh")
    assert ran.code == code
    resume = ran.sentence.rpartition("go on with: ")[2]
    assert resume.startswith("rankine compress ")
    assert "--fresh" not in resume
    assert not output.exists()
    assert (tmp_path / "out.rankine-work" / "entries").exists()
    monkeypatch.undo()
    assert rankine(*command).code == 0
    assert (output / "config.json").exists()
    assert not (tmp_path / "out.rankine-work").exists()
