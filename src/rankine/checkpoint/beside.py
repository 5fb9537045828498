"""Write beside, then rename: an output directory is whole or not there."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from rankine.checkpoint.form import ADAPTER, CONFIG, PATCH
from rankine.errors import UserError
from rankine.ranks import runs

#: Behind a directory's own name, in that of the sibling which takes its place.
WRITING = "writing-"
#: What a disk says that takes no more, or nothing from us.
ROOM = "make room, and give the same command again: finished work is not done twice"
CHOOSE = "choose another place, or ask for leave to write there"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG)


def check_output(directory: Path, force: bool) -> None:
    """Raises UserError unless `directory` may be written: it is new, or `force` and it is empty
    or a model. Meant to be called before any work as well."""
    if not os.path.lexists(directory):
        return
    if not force:
        raise UserError(
            f"expected a new output directory, found {directory}: choose another one, or "
            "--force to replace it"
        )
    if directory.is_symlink() or not directory.is_dir():
        raise UserError(f"expected a directory to replace, found a file or a link at {directory}")
    known = {CONFIG, PATCH, ADAPTER}
    if any(directory.iterdir()) and not any((directory / name).is_file() for name in known):
        raise UserError(
            f"expected a model directory to replace, found something else in {directory}: "
            "empty it yourself, or choose another output"
        )


@contextmanager
def written_beside(directory: Path, force: bool = False) -> Iterator[Path]:
    """A temporary sibling to write into; on success it takes the place of `directory`.

    On any exception, KeyboardInterrupt included, the sibling is removed and what stood at
    `directory` stays; one that a killed process left is removed by the next. Raises UserError for
    an output that may not be written and for a disk that cannot take it.
    """
    directory = Path(os.path.abspath(directory))
    check_output(directory, force)
    prefix = f".{directory.name}.{WRITING}"
    with disk_errors(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        _clear(directory.parent, prefix)
        beside = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=directory.parent))
    try:
        with disk_errors(directory), _held(beside):
            yield beside
            beside.chmod(0o777 & ~_umask())
            check_output(directory, force)
            _take_place(beside, directory)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


@contextmanager
def new_file(path: Path, force: bool = False) -> Iterator[Path]:
    """A file of the same name in a temporary directory beside; on success it (and whatever was
    written next to it, first) moves to `path`. Raises UserError as `written_beside` does."""
    if path.is_dir() or (path.exists() and not force):
        raise UserError(
            f"expected a new output file, found {path}: choose another one, or --force to replace "
            "a file"
        )
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            yield Path(folder) / path.name
            for file in sorted(Path(folder).iterdir(), key=lambda f: f.name == path.name):
                file.replace(path.parent / file.name)


@contextmanager
def _held(beside: Path) -> Iterator[bool]:
    """Inside, the directory is locked (if it was free: the value). The lock goes with the process,
    however that ends."""
    handle = os.open(beside, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = True
    except OSError:  # somebody writes there, or the file system has no locks
        free = False
    try:
        yield free
    finally:
        os.close(handle)


def _clear(parent: Path, prefix: str) -> None:
    """Remove what killed processes left half-written: what nobody holds. One without content may
    have been made this moment, by a process that is about to hold it."""
    with suppress(OSError):  # others clear too
        for left in parent.iterdir():
            if not left.name.startswith(prefix):
                continue
            maker = left.name.removeprefix(prefix).partition("-")[0]
            if any(left.iterdir()) or not (maker.isdecimal() and runs(int(maker))):
                with _held(left) as free:
                    if free:
                        shutil.rmtree(left, ignore_errors=True)


def final_name(beside: Path) -> str:
    """The name that a directory from `written_beside` will have."""
    return beside.name.removeprefix(".").rpartition(".")[0] or beside.name


def _take_place(beside: Path, directory: Path) -> None:
    if not directory.exists():
        beside.rename(directory)
        return
    # Two renames: at every moment one whole copy exists, and an error puts the old one back.
    old = Path(tempfile.mkdtemp(prefix=f".{directory.name}.old.", dir=directory.parent))
    directory.rename(old)
    try:
        beside.rename(directory)
    except BaseException:
        old.rename(directory)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def disk_errors(directory: Path) -> Iterator[None]:
    """Inside, what a full or read-only disk says becomes a UserError about `directory`: it is the
    user's to mend."""
    try:
        yield
    except Exception as error:
        number = _error_number(error)
        if number not in (*FULL, *CLOSED) and not isinstance(error, SafetensorError):
            raise
        what_to_do = CHOOSE if number in CLOSED else ROOM
        raise _not_written(directory, error, what_to_do) from error


def _error_number(error: Exception) -> int | None:
    """The system's errno; Rust's libraries (safetensors, tokenizers) tell it in words."""
    if isinstance(error, OSError):
        return error.errno
    told = re.search(r"\(os error (\d+)\)", str(error))
    return int(told[1]) if told and not isinstance(error, UserError) else None


def _not_written(directory: Path, error: Exception, what_to_do: str) -> UserError:
    found = (error.strerror if isinstance(error, OSError) else None) or str(error)
    with suppress(OSError):
        found += f", {shutil.disk_usage(directory.parent).free / 2**20:,.0f} MiB free"
    return UserError(f"expected to write {directory}, found: {found}; {what_to_do}")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
