"""Saved checkpoints of every family, written once per session."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checkpoint_models as families
import pytest
import torch
from safetensors.torch import save_file

from rankine.checkpoint import save
from rankine.patch import Patch

SOURCE = Path(__file__).parents[2] / "src"


@dataclass
class Saved:
    """A checkpoint and the model in memory that it was written from."""

    directory: Path
    model: Any
    patch: Patch
    logits: torch.Tensor


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """name → Saved, each built at its first use."""
    root, known = tmp_path_factory.mktemp("checkpoints"), {}

    def get(name):
        if name not in known:
            model, patch = families.PATCHED[name]()
            patch.apply(model)
            directory = save(model, root / name, patch)
            logits = families.logits(model)
            save_file({"logits": logits}, root / f"{name}.logits.safetensors")
            known[name] = Saved(directory, model, patch, logits)
        return known[name]

    return get


@pytest.fixture
def fresh_environment():
    """What a fresh process needs: our source, the same number of threads, no network."""
    threads = str(torch.get_num_threads())
    ours = {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **ours}


@pytest.fixture
def fresh(fresh_environment):
    """Run a script in a fresh Python process; returns its stdout."""

    def run(script, *arguments, path=None, check=True):
        environment = dict(fresh_environment)
        if path is not None:
            environment["PYTHONPATH"] = path
        done = subprocess.run(
            [sys.executable, "-c", script, *map(str, arguments)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        if check:
            assert done.returncode == 0, done.stderr[-3000:]
            return done.stdout
        return done

    return run
