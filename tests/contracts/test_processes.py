"""The count of fresh processes counts them."""

import subprocess
import sys

import pytest

from processes import is_python


@pytest.mark.process
def test_a_process_is_counted_for_its_test(request):
    counter = request.config.pluginmanager.get_plugin("rankine-processes")
    before = counter.started[request.node.nodeid]
    subprocess.run([sys.executable, "-I", "-S", "-c", ""], check=True)
    subprocess.run(["true"], check=True)
    assert counter.started[request.node.nodeid] == before + 1
    assert before == 0


@pytest.mark.parametrize(
    ("arguments", "python"),
    [
        ((sys.executable, [sys.executable, "-c", ""]), True),
        ((None, ["/a/bin/rankine", "demo"]), True),
        ((None, ("torchrun", "-m", "rankine")), True),
        (("", "python3 -m x"), True),
        (("/usr/bin/cc", ["cc", "python.c"]), False),
        ((None, "git status"), False),
        ((b"/bin/true", [b"true"]), False),
    ],
)
def test_what_is_python(arguments, python):
    assert is_python((*arguments, None, None)) is python
