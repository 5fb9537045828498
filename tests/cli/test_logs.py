"""What reaches stderr: sentences for people, or one JSON object per line."""

import json
import logging
import sys

import pytest


def objects(ran):
    """Every line of stderr, read."""
    return [json.loads(line) for line in ran.err.splitlines()]


def test_every_line_is_an_object_and_the_last_says_how_it_ended(rankine, tiny, small, tmp_path):
    made = ("compress", tiny, "--method", "svd", "--keep", "0.6", *small, "-o", tmp_path / "out")
    ran = rankine(*made, "--log-json", "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["verb"] == "compress"
    lines = objects(ran)
    assert {line["schema"] for line in lines} == {1}
    assert lines[-1]["exit_code"] == 0
    progress = [line for line in lines if "stage" in line]
    assert {"stage", "done", "total", "time", "level", "logger", "message"} <= set(progress[0])
    assert progress[-1]["done"] == progress[-1]["total"]
    timed = [line["message"] for line in lines if line["logger"] == "rankine.pipeline"]
    assert any(message.startswith("solve of ") for message in timed)


def test_a_mistake_is_an_object_wherever_the_option_stands(rankine):
    for arguments in (["--log-json", "methods", "sdv"], ["methods", "sdv", "--log-json"]):
        ran = rankine(*arguments)
        (line,) = objects(ran)
        assert (ran.code, line["exit_code"], line["level"]) == (2, 2, "error")
        assert 'did you mean "svd"' in line["message"]


def test_a_broken_program_is_an_object_with_its_traceback(rankine, monkeypatch):
    def fails():
        raise ZeroDivisionError("in here")

    monkeypatch.setattr("rankine.cli.known.catalogue", fails)
    ran = rankine("methods", "--log-json")
    (line,) = objects(ran)
    assert (ran.code, line["exit_code"]) == (1, 1)
    assert "ZeroDivisionError: in here" in line["message"]
    assert "in fails" in line["traceback"]


def test_what_others_write_becomes_objects(rankine, monkeypatch):
    def chatty():
        print("half a line", end="", file=sys.stderr)
        print(", the rest\r10 %\r100 %", file=sys.stderr)
        logging.getLogger("elsewhere").warning("a %s", "record")
        sys.stderr.write("no end")
        return {}

    monkeypatch.setattr("rankine.cli.known.catalogue", chatty)
    lines = objects(rankine("methods", "--log-json"))
    found = [(line["logger"], line["message"]) for line in lines]
    assert ("stderr", "half a line, the rest") in found
    assert ("stderr", "100 %") in found
    assert ("elsewhere", "a record") in found
    assert ("stderr", "no end") in found
    assert lines[-1]["exit_code"] == 0


def test_warnings_of_ours_are_sentences(rankine, monkeypatch):
    def warns():
        logging.getLogger("rankine.somewhere").warning("this is slow")
        logging.getLogger("rankine.somewhere").info("nobody asked")
        return {}

    monkeypatch.setattr("rankine.cli.known.catalogue", warns)
    assert rankine("methods").err == "rankine: warning: this is slow\n"


@pytest.mark.parametrize("arguments", [["methods"], ["methods", "sdv"], ["methods", "--log-json"]])
def test_logging_is_left_as_found(rankine, arguments):
    def state():
        ours = logging.getLogger("rankine")
        levels = ours.level, logging.getLogger("stderr").level
        return list(ours.handlers), levels, list(logging.getLogger().handlers), sys.stderr

    before = state()
    rankine(*arguments)
    assert state() == before


def test_every_verb_speaks_json():
    import typer

    from rankine.cli.app import app

    for name, command in typer.main.get_command(app).commands.items():
        assert "json" in {parameter.name for parameter in command.params}, name
