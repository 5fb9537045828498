"""Disks that are full, closed or somewhere else: one sentence, nothing half written, and with more
room the same command goes on where it stopped."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from rankine import cli


class Disk:
    """A small file system of its own, in memory."""

    def __init__(self, place: Path, kib: int):
        self.place = place
        place.mkdir()
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "rankine-test", place],
            check=True, capture_output=True,
        )  # fmt: skip

    def again(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", self.place], check=True)

    def away(self) -> None:
        subprocess.run(["umount", self.place], check=True)


@pytest.fixture
def disk(tmp_path):
    """disk(kib) → a file system of that size; needs the right to mount."""
    made = []

    def make(kib: int) -> Disk:
        try:
            made.append(Disk(tmp_path / "disk", kib))
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"a small file system needs the right to mount one ({error})")
        return made[-1]

    yield make
    for one in made:
        one.away()


@contextmanager
def files_of_at_most(size: int):
    """No file of this process may grow beyond `size` bytes: what a quota does, for anybody."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def job(tiny, small):
    """The arguments of a run, all but its output."""
    return ["compress", tiny, "--method", "svd_llm", "--keep", "0.7", "--evaluate", "no", *small]


@pytest.fixture(scope="module")
def whole(job, tmp_path_factory) -> Path:
    """What the run writes where there is room."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert cli.run([*map(str, job), "-o", str(out)]) == 0
    return out


def names(directory: Path) -> set[str]:
    return {file.name for file in directory.iterdir()}


def same_model(directory: Path, other: Path) -> bool:
    files = ("model.safetensors", "config.json", "tokenizer.json", "SHA256SUMS")
    return all((directory / f).read_bytes() == (other / f).read_bytes() for f in files)


#: Size of the disk → what it is too small for.
STAGES = {
    40: "the survey",
    80: "the solved targets",
    160: "the weights",
    230: "the tokenizer",
    400: "the report",
}


@pytest.mark.parametrize("kib", STAGES, ids=STAGES.get)
def test_a_full_disk_at_every_stage(kib, disk, job, whole, refused, rankine):
    room = disk(kib)
    out = room.place / "out"
    sentence = refused(*job, "-o", out)
    assert "No space left" in sentence
    assert "make room" in sentence
    assert names(room.place) <= {"out.rankine-work"}
    room.again("size=4m")
    assert rankine(*job, "-o", out).code == 0
    assert names(room.place) == {"out"}
    assert same_model(out, whole)


@pytest.mark.parametrize("size", [100, 60_000])
def test_a_quota(size, job, whole, refused, rankine, tmp_path):
    with files_of_at_most(size):
        assert "too large" in refused(*job, "-o", tmp_path / "out").lower()
    assert names(tmp_path) <= {"out.rankine-work"}
    assert rankine(*job, "-o", tmp_path / "out").code == 0
    assert same_model(tmp_path / "out", whole)


def test_the_old_output_stays_when_the_new_one_does_not_fit(disk, job, whole, refused):
    room = disk(1800)
    out = shutil.copytree(whole, room.place / "out")
    (out / "mine.txt").write_text("mine")
    refused(*job, "--keep", "0.6", "-o", out, "--force")
    assert same_model(out, whole)
    assert (out / "mine.txt").read_text() == "mine"
    assert names(room.place) == {"out", "out.rankine-work"}


def test_the_work_directory_is_another_disk(disk, job, whole, refused, rankine, tmp_path):
    """Full, it stops the run; large enough, the output is still written beside its own place."""
    room = disk(40)
    run = [*job, "-o", tmp_path / "out", "--work", room.place / "work"]
    refused(*run)
    assert not (tmp_path / "out").exists()
    room.again("size=1m")
    assert rankine(*run).code == 0
    assert same_model(tmp_path / "out", whole)
    assert names(room.place) == set()


def test_the_output_is_another_disk(disk, job, whole, refused, rankine, tmp_path):
    room = disk(160)
    run = [*job, "-o", room.place / "out", "--work", tmp_path / "work"]
    refused(*run)
    assert names(room.place) == set()
    assert (tmp_path / "work" / "entries").is_dir()
    room.again("size=4m")
    assert rankine(*run).code == 0
    assert same_model(room.place / "out", whole)


@pytest.mark.parametrize("where", ["output", "work"])
def test_a_disk_that_takes_nothing(where, disk, job, refused, tmp_path):
    room = disk(100)
    room.again("ro")
    out = (room.place if where == "output" else tmp_path) / "out"
    work = ["--work", room.place / "work"] if where == "work" else []
    sentence = refused(*job, "-o", out, *work)
    assert "Read-only" in sentence
    assert "choose another place" in sentence
    assert not out.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere: see the read-only disk")
def test_no_leave_to_write(job, refused, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    assert "Permission denied" in refused(*job, "-o", tmp_path / "closed" / "out")


def test_places_that_cannot_be(job, refused, tmp_path, text):
    assert "expected to write" in refused(*job, "-o", text / "out")
    assert "too long" in refused(*job, "-o", tmp_path / ("x" * 300))
    assert names(tmp_path) == set()


def test_boundaries_that_do_not_fit_anywhere(tiny, small, disk, refused, monkeypatch):
    """The way back waits in the work directory; nothing is in the journal by then."""
    room = disk(20)
    monkeypatch.setattr(sys.modules["rankine.statistics.survey"], "IN_MEMORY", 0)
    run = ["compress", tiny, "--method", "kfac_svd", "--keep", "0.8", "--evaluate", "no", *small]
    assert "No space left" in refused(*run, "-o", room.place / "out")
    assert names(room.place) == set()


def test_healing(whole, text, disk, refused, rankine):
    """Its checkpoints go to the journal, its result beside the output."""
    room = disk(60)
    run = ["heal", whole, "--data", text, "--tokens", "8x32", "--set", "batch=4"]
    run += [
        "--evaluation",
        text,
        "--eval-tokens",
        "200",
        "--threads",
        "1",
        "-o",
        room.place / "out",
    ]
    assert "No space left" in refused(*run)
    assert names(room.place) <= {"out.rankine-work"}
    room.again("size=6m")
    assert rankine(*run).code == 0
    assert names(room.place) == {"out"}


@pytest.mark.parametrize("to", ["dense", pytest.param("onnx", marks=pytest.mark.slow)])
def test_exports(to, whole, disk, refused):
    if to == "onnx":
        pytest.importorskip("onnx")
    room = disk(60)
    out = room.place / ("out.onnx" if to == "onnx" else "out")
    assert "No space left" in refused("export", whole, "--to", to, "-o", out)
    assert names(room.place) == set()


def test_a_page_of_reports(whole, disk, refused):
    room = disk(60)
    assert "No space left" in refused("report", whole, "-o", room.place / "page")
