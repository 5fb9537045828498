"""A plugin of this suite: fresh Python processes are counted, as each costs seconds of imports.

A test that starts one carries the marker `process`, and all tests without `slow` together start at
most `MOST`. Processes are counted where Python itself tells of them (PEP 578), fixtures included.
At the end: which tests took more than 5 seconds of processor time and are not marked `slow`.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import pytest

MOST = 25
SECONDS = 5.0
#: What a command's first word begins with when it starts Python.
PYTHONS = ("python", "pytest", "torchrun", "rankine", "pip")


class Processes:
    """Counts for the tests of one process (a worker of xdist, or all)."""

    def __init__(self, config: pytest.Config):
        self.config = config
        self.item: pytest.Item | None = None
        self.started: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()
        sys.addaudithook(self.heard)

    def heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        """An audit hook: it cannot be taken away again."""
        if event == "subprocess.Popen" and self.item is not None and is_python(arguments):
            self.started[self.item.nodeid] += 1

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """Notes whose processes and seconds these are; those of slow tests are not counted."""
        self.item, start = item, time.process_time()
        try:
            return (yield)
        finally:
            self.item = None
            if item.get_closest_marker("slow"):
                del self.started[item.nodeid]
            elif (spent := time.process_time() - start) > SECONDS:
                self.seconds[item.nodeid] = round(spent, 1)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        """Fails a test that starts a process and does not say so."""
        result = yield
        if self.started[item.nodeid] and not item.get_closest_marker("process"):
            pytest.fail("expected the marker `process` on a test that starts Python, found none")
        return result

    @pytest.hookimpl(optionalhook=True)  # without xdist there are no nodes
    def pytest_testnodedown(self, node: Any) -> None:
        """In xdist's controller: what a worker counted."""
        for name in ("started", "seconds"):
            getattr(self, name).update(getattr(node, "workeroutput", {}).get(name, {}))

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """A worker hands its counts over, and who has all of them judges them."""
        if hasattr(self.config, "workeroutput"):
            self.config.workeroutput |= {
                "started": dict(self.started),
                "seconds": dict(self.seconds),
            }
        elif sum(self.started.values()) > MOST and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Both lists."""
        for name, seconds in self.seconds.most_common():
            terminalreporter.write_line(
                f"not marked slow, {seconds} s of processor time (more than {SECONDS:g}): {name}"
            )
        total = sum(self.started.values())
        terminalreporter.write_line(f"{total} fresh processes in fast tests (at most {MOST})")
        if total > MOST:
            for name, count in self.started.most_common():
                terminalreporter.write_line(f"{count} by {name}", red=True)


def is_python(arguments: tuple[Any, ...]) -> bool:
    """Does `subprocess.Popen(executable, args, ...)` start Python?"""
    executable, words, *_ = arguments
    many = isinstance(words, Iterable) and not isinstance(words, str | bytes)
    first = executable or (next(iter(words), "") if many else words)
    return Path(str(first)).name.startswith(PYTHONS)


def pytest_configure(config: pytest.Config) -> None:
    """Once per process."""
    config.pluginmanager.register(Processes(config), "rankine-processes")
