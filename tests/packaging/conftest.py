"""The wheel, and an environment outside the tree in which it and a package of methods are
installed. Nothing is downloaded: the dependencies are those of this interpreter, seen through a
.pth file, which shows packages but runs no editable install."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = Path(__file__).parent / "sample"
#: No index and no build environment: what is needed is here, or the test fails.
OFFLINE = ("--no-index", "--no-build-isolation", "--disable-pip-version-check", "--quiet")


def pip(*arguments: object, python: Path = Path(sys.executable)) -> str:
    """What pip printed."""
    command = [sys.executable, "-m", "pip", "--python", str(python), *map(str, arguments)]
    return completed(command)


def completed(command: list[str], **options: object) -> str:
    """stdout of a command that must succeed, without this tree on its path."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=600, **options
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def built(source: Path, place: Path) -> Path:
    """The wheel of a source tree."""
    pip("wheel", source, "--no-deps", *OFFLINE, "--wheel-dir", place)
    (file,) = place.glob("*.whl")
    return file


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools leaves its scaffolding in the tree."""
    source = tmp_path_factory.mktemp("source") / "rankine"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    left_out = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", source / "src", ignore=left_out)
    return built(source, tmp_path_factory.mktemp("wheel"))


@dataclass(frozen=True)
class Environment:
    """A fresh environment and an empty directory to stand in."""

    root: Path
    cwd: Path

    def bin(self, name: str) -> Path:
        """A program of it."""
        return self.root / ("Scripts" if os.name == "nt" else "bin") / name

    def run(self, program: str, *arguments: object) -> str:
        """stdout of one of its programs."""
        return completed([str(self.bin(program)), *map(str, arguments)], cwd=self.cwd)

    @property
    def packages(self) -> Path:
        """Its own site-packages."""
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        return self.root / "lib" / version / "site-packages"


@pytest.fixture(scope="session")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """With the wheel and the sample package. pip resolves their requirements, torch among them,
    from what is visible; it could not fetch anything."""
    made = Environment(tmp_path_factory.mktemp("venv"), tmp_path_factory.mktemp("elsewhere"))
    venv.create(made.root, with_pip=False, symlinks=os.name != "nt")
    places = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (made.packages / "dependencies.pth").write_text("\n".join(sorted(places)) + "\n")
    pip("install", wheel, *OFFLINE, python=made.bin("python"))
    source = tmp_path_factory.mktemp("sample") / "sample"
    shutil.copytree(SAMPLE, source)
    sample = built(source, tmp_path_factory.mktemp("sample-wheel"))
    pip("install", sample, *OFFLINE, python=made.bin("python"))
    return made
