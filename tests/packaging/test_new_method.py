"""`rankine new-method`: what it writes passes every check before anybody touched it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rankine import cli

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A checkout of our own, with a new method in it."""
    copy = tmp_path_factory.mktemp("checkout")
    left_out = shutil.ignore_patterns("__pycache__", "*.egg-info", ".cache")
    for name in ("src", "tests", "tools", "docs", "benchmarks"):
        shutil.copytree(ROOT / name, copy / name, ignore=left_out)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy)
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(copy / "src")
        assert cli.run(["new-method", "my_svd"]) == 0
        assert cli.run(["new-method", "my_svd"]) == 2
    after = [p for p in copy.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    changed = {str(p.relative_to(copy)) for p in after if p.read_bytes() != before.get(p)}
    return copy, changed


def ran(tree, *command):
    """A tool in that checkout; its output."""
    environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=tree, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.process
@pytest.mark.slow
def test_four_files_and_what_is_generated_from_them(tree):
    copy, changed = tree
    four = {
        "src/rankine/methods/my_svd.py",
        "tests/methods/table.py",
        "benchmarks/claims/my_svd.py",
        "docs/methods/my_svd.md",
    }
    generated = {"README.md", "docs/methods.md", "src/rankine/assets/catalogue.json"}
    assert changed - generated <= four | {"docs/cli.md"}
    assert four | generated <= changed
    files = sorted(name for name in four if name.endswith(".py"))
    ran(copy, "ruff", "check", *files)
    ran(copy, "ruff", "format", "--check", *files)
    checks = ("-p", "no:xdist", "tests/methods/test_table.py", "-k", "my_svd")
    printed = ran(copy, "pytest", *checks)
    assert "failed" not in printed
    assert "...." in printed
