"""Settings of the whole process that a verb, or a library it calls, may change: put back as they
were found. A library that is not imported yet has nothing to put back.
"""

from __future__ import annotations

import functools
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
#: Where transformers keeps its verbosity and its bars.
LOGGING = "transformers.utils.logging"
#: How to read a setting, and how to write it.
Setting = tuple[Callable[[], Any], Callable[[Any], Any]]


def leaves_as_found(verb: Callable[P, R]) -> Callable[P, R]:
    """The same function, inside `as_found`, where transformers draws no bars of its own: a library
    prints nothing. (Downloads, which take long, still do.)"""

    @functools.wraps(verb)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        _, downloads = bars_shown()
        with as_found():
            show_bars((False, downloads))
            return verb(*args, **kwargs)

    return called


@contextmanager
def as_found() -> Iterator[None]:
    """Put back at the end: the environment, warning filters, and the `settings`."""
    environment = dict(os.environ)
    found = [(setting, setting[0]()) for setting in settings()]
    try:
        with warnings.catch_warnings():
            yield
    finally:
        for (_, write), value in found:
            write(value)
        put_back(environment)


def settings() -> Iterator[Setting]:
    """Of the libraries that are imported: states of random generators, torch's threads, default
    dtype and gradient mode, verbosity and progress bars of transformers."""
    yield random.getstate, random.setstate
    if numpy := sys.modules.get("numpy"):
        yield numpy.random.get_state, numpy.random.set_state
    if torch := sys.modules.get("torch"):
        yield torch.get_rng_state, torch.set_rng_state
        if torch.cuda.is_initialized():
            yield torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all
        yield torch.get_num_threads, torch.set_num_threads
        yield torch.get_default_dtype, torch.set_default_dtype
        yield torch.is_grad_enabled, torch.set_grad_enabled
    if logging := sys.modules.get(LOGGING):
        yield logging.get_verbosity, logging.set_verbosity
        yield bars_shown, show_bars


def bars_shown() -> tuple[bool, bool]:
    """Do transformers, and the hub for downloads, show progress bars? (Imports both.)"""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled
    from transformers.utils import logging

    return logging.is_progress_bar_enabled(), not are_progress_bars_disabled()


def show_bars(shown: tuple[bool, bool]) -> None:
    """Undo a change of `bars_shown`. (A switch of transformers moves that of the hub as well.)"""
    if bars_shown() == shown:
        return
    from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    (logging.enable_progress_bar if shown[0] else logging.disable_progress_bar)()
    (enable_progress_bars if shown[1] else disable_progress_bars)()


def put_back(environment: dict[str, str]) -> None:
    """The variables as they were."""
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    for name, value in environment.items():
        if os.environ.get(name) != value:
            os.environ[name] = value
