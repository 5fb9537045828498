"""Help and wrong arguments answer without the weight of torch, and in less than two seconds.

Seconds are those of this process on the processor: other jobs on the machine are not the point.
"""

import json

import pytest

HEAVY = ("torch", "transformers", "scipy", "datasets", "peft")

#: Runs several commands in one fresh process: each must leave the heavy packages unimported, and
#: all of them together stay below two seconds each.
PROBE = f"""
import contextlib, io, json, sys
from time import process_time
from rankine import cli
found = []
for arguments in json.loads({{arguments!r}}):
    start, text = process_time(), io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        code = cli.run(arguments)
    heavy = [name for name in {HEAVY!r} if name in sys.modules]
    found.append([arguments, code, process_time() - start, heavy, text.getvalue()])
print(json.dumps(found))
"""


def probe(fresh, *commands):
    """(arguments, code, seconds, heavy modules, text) of each command, in one fresh process."""
    ran = fresh(code=PROBE.format(arguments=json.dumps([list(c) for c in commands])))
    assert ran.code == 0, ran.err
    return json.loads(ran.out.splitlines()[-1])


def verbs():
    from rankine.cli.app import app

    return [command.name or command.callback.__name__ for command in app.registered_commands]


@pytest.mark.process
def test_help_of_every_verb_is_light(fresh):
    commands = [["--help"], ["--version"], *([verb, "--help"] for verb in verbs())]
    for arguments, code, seconds, heavy, text in probe(fresh, *commands):
        assert (code, heavy) == (0, []), (arguments, text)
        assert seconds < 2, arguments
        assert text


@pytest.mark.process
def test_wrong_arguments_are_light(fresh):
    wrong = [
        ["compres"],
        ["compress", "--keeep", "0.5"],
        ["compress", "embedded", "--keep", "0", "-o", "x"],
        ["compress", "embedded", "--keep", "0.5", "--method", "svdd", "-o", "x"],
        ["compress", "embedded", "--keep", "0.5", "--set", "rdige=1", "-o", "x"],
        ["compress", "embedded", "--keep", "0.5"],
        ["compress", "embedded", "-o", "x"],
        ["inspect"],
        ["methods", "sdv"],
    ]
    for arguments, code, seconds, heavy, text in probe(fresh, *wrong):
        assert (code, heavy) == (2, []), (arguments, text)
        assert seconds < 2, arguments
        assert text.startswith("rankine: "), text
        assert text.count("\n") == 1, text


@pytest.mark.process
def test_a_whole_process_answers_within_two_seconds(fresh):
    code = "import time; from rankine import cli; cli.run([]); print(time.process_time())"
    assert float(fresh(code=code).out.splitlines()[-1]) < 2


@pytest.mark.process
def test_import_is_light_and_lazy(fresh):
    code = f"import sys, rankine; print([n for n in {HEAVY!r} if n in sys.modules], dir(rankine))"
    ran = fresh(code=code)
    assert ran.out.startswith("[] "), ran.out + ran.err
    assert "compress" in ran.out
