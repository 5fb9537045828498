"""Every verb, in Python and on the command line, leaves the process as it found it, and as a
library prints nothing."""

import ast
import logging
import os
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import rankine as library
from rankine.manners import as_found, bars_shown
from rankine.testing import models

SOURCE = Path(library.__file__).parent


def state():
    """All that a verb might be tempted to change."""
    ours = logging.getLogger("rankine")
    return {
        "environment": dict(os.environ),
        "warnings": list(warnings.filters),
        "random": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "torch": torch.get_rng_state().tolist(),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "verbosity": transformers.logging.get_verbosity(),
        "bars": bars_shown(),
        "handlers": [type(h) for h in (*logging.getLogger().handlers, *ours.handlers)],
        "levels": (logging.getLogger().level, ours.level),
        "directory": os.getcwd(),
    }


@pytest.fixture(scope="module")
def made(tiny, text, tmp_path_factory):
    """A compressed directory."""
    output = tmp_path_factory.mktemp("manners") / "out"
    asked = {"tokens": "2x32", "eval_tokens": 100, "calibration": str(text)}
    library.compress(str(tiny), method="svd", keep=0.6, output=output, evaluate=False, **asked)
    return output


def verbs(tiny, text, made, place):
    """Name → a small call of each public verb."""
    data = {"evaluation": str(text), "eval_tokens": 100}
    small = {"calibration": str(text), "tokens": "2x32", "threads": 1, **data}
    training = {"data": str(text), "steps": 2, "tokens": "4x32", **data}
    model = str(tiny)
    return {
        "compress": lambda: library.compress(
            model, method="lord", keep=0.7, set={"allocation": "uniform"}, **small
        ),
        "plan": lambda: library.plan(model, method="svd_llm", keep=0.7, **small),
        "compare": lambda: library.compare(model, methods=["svd"], keep=[0.7], **small),
        "inspect": lambda: library.inspect(made),
        "evaluate": lambda: library.evaluate(str(made), **data),
        "heal": lambda: library.heal(
            str(made), teacher=model, output=place / "healed", seed=3, **training
        ),
        "export": lambda: library.export(str(made), place / "dense", to="dense"),
        "load": lambda: library.load(str(made)),
        "save": lambda: library.save(models.llama(), place / "saved"),
        "catalogue": library.catalogue,
    }


NAMES = (
    *("compress", "plan", "compare", "inspect", "evaluate", "heal", "export", "load", "save"),
    "catalogue",
)


@pytest.mark.parametrize("name", NAMES)
def test_a_verb_leaves_no_trace_and_prints_nothing(name, tiny, text, made, tmp_path, capfd):
    call = verbs(tiny, text, made, tmp_path)[name]
    models.llama()  # what a first model draws or imports is not the verb's doing
    torch.set_num_threads(1)
    before = state()
    capfd.readouterr()
    call()
    printed = capfd.readouterr()
    after = state()
    assert {k: (before[k], after[k]) for k in before if before[k] != after[k]} == {}
    assert (printed.out, printed.err) == ("", "")


@pytest.mark.parametrize("verb", ["compress", "eval", "generate"])
def test_so_does_a_command(verb, rankine, tiny, text, made, tmp_path):
    asked = {
        "compress": (tiny, "--method", "svd", "--keep", "0.6", "-o", tmp_path / "out"),
        "eval": (made, "--evaluation", text, "--eval-tokens", "100"),
        "generate": (made, "--prompt", "a", "--max-tokens", "2", "--temperature", "1"),
    }
    more = ("--calibration", text, "--tokens", "2x32", "--eval-tokens", "100")
    before = state()
    ran = rankine(verb, *asked[verb], *(more if verb == "compress" else ()), "--threads", "1")
    after = state()
    assert ran.code == 0, ran.err
    assert {k: (before[k], after[k]) for k in before if before[k] != after[k]} == {}


def test_all_of_it_is_put_back_after_an_error():
    before = state()

    def changes():
        os.environ["OMP_NUM_THREADS"] = "77"
        os.environ["NEW_HERE"] = "1"
        del os.environ["PATH"]
        warnings.simplefilter("error")
        random.seed(5), np.random.seed(5), torch.manual_seed(5)
        torch.set_num_threads(before["threads"] + 1)
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        assert {k for k in before if state()[k] != before[k]} >= {
            *("environment", "warnings", "random", "numpy", "torch", "threads", "dtype"),
            *("gradients", "verbosity", "bars"),
        }
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), as_found():
        changes()
    assert {k for k in before if state()[k] != before[k]} == set()


def test_the_library_has_a_quiet_logger():
    assert any(isinstance(h, logging.NullHandler) for h in logging.getLogger("rankine").handlers)


def test_only_the_command_line_prints():
    printing = [
        f"{file.relative_to(SOURCE)}:{node.lineno}"
        for file in SOURCE.rglob("*.py")
        if file.relative_to(SOURCE).parts[0] != "cli"
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
    ]
    assert printing == []
