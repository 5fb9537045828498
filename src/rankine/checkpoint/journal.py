"""One entry per unit of work: a run that was killed goes on where it stopped, same bytes."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rankine.checkpoint.beside import disk_errors
from rankine.checkpoint.form import read_json
from rankine.checkpoint.shards import Spec, write_file
from rankine.errors import UserError
from rankine.patch import Patch

HEAD = "journal.json"
LOCK = "lock"
ENTRIES = "entries"
SCRATCH = "scratch"


def digest(data: Mapping[str, Any]) -> str:
    """sha256 of the canonical JSON (sorted keys, no spaces)."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


class Journal:
    """A work directory: `entries/<stage>/<unit>.safetensors` and `.json`, written beside and
    renamed, the json last: it is the commit mark and carries the tensors' hash.

    `fingerprint` says on what the entries depend (model, data, recipe, versions, threads); each
    entry carries its digest. Open with `Journal.open`; a context manager that holds a lock.
    """

    def __init__(self, path: Path, fingerprint: Mapping[str, str], lock: IO[str] | None):
        self.path, self.fingerprint, self._lock = path, dict(fingerprint), lock
        self.digest = digest(self.fingerprint)

    @classmethod
    def open(cls, path: str | Path, fingerprint: Mapping[str, str], fresh: bool = False) -> Journal:
        """Open or create; `fresh` forgets all entries.

        Raises UserError when another run holds the directory, when it is no journal, and when
        the fingerprint is not the one its entries were made with (it names what changed).
        """
        path = Path(path)
        if path.exists() and not path.is_dir():
            raise UserError(f"expected a work directory, found a file at {path}")
        is_new = not path.exists() or not any(path.iterdir())
        if not is_new and not (path / HEAD).is_file() and not (path / LOCK).is_file():
            raise UserError(f"expected a work directory of rankine, found something else in {path}")
        with disk_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            lock = _lock(path)
        try:
            shutil.rmtree(path / SCRATCH, ignore_errors=True)  # of a killed run
            if fresh:
                shutil.rmtree(path / ENTRIES, ignore_errors=True)
                (path / HEAD).unlink(missing_ok=True)
            with disk_errors(path):
                _check_head(path, fingerprint)
        except BaseException:
            lock.close()
            raise
        return cls(path, fingerprint, lock)

    @classmethod
    def beside(cls, path: str | Path, fingerprint: Mapping[str, str]) -> Journal:
        """The journal that another rank of the same run holds open. Each entry is made by one of
        them, and looked for by the others only behind a barrier after that."""
        return cls(Path(path), fingerprint, None)

    @property
    def scratch(self) -> Path:
        """A directory for what a running process needs and a resumed one does not."""
        place = self.path / SCRATCH
        with disk_errors(self.path):
            place.mkdir(exist_ok=True)
        return place

    def has_entries(self) -> bool:
        """Is there any work to resume?"""
        return (self.path / ENTRIES).exists()

    def get(self, stage: str, unit: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """(tensors, meta) of an entry; None where there is none or it is damaged: do it again."""
        tensors_file, meta_file = self._files(stage, unit)
        try:
            entry = json.loads(meta_file.read_text(encoding="utf-8"))
            whole = (entry["stage"], entry["unit"], entry["journal"]) == (stage, unit, self.digest)
            if not whole or digest(entry["meta"]) != entry["meta_sha256"]:
                return None
            with tensors_file.open("rb") as f:
                if hashlib.file_digest(f, "sha256").hexdigest() != entry["sha256"]:
                    return None
            return load_file(tensors_file), entry["meta"]
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            return None

    def put(
        self,
        stage: str,
        unit: str,
        tensors: Mapping[str, Tensor],
        meta: Mapping[str, Any] | None = None,
    ) -> None:
        """Write an entry (replacing one of the same name); `meta` is JSON."""
        tensors_file, meta_file = self._files(stage, unit)
        specs = [Spec.of(name, tensor) for name, tensor in tensors.items()]
        meta = dict(meta or {})
        with disk_errors(self.path):
            tensors_file.parent.mkdir(parents=True, exist_ok=True)
            meta_file.unlink(missing_ok=True)
            with _beside(tensors_file) as file:
                written = write_file(file, specs, tensors.__getitem__)
            entry = {
                "stage": stage,
                "unit": unit,
                "journal": self.digest,
                "sha256": written,
                "meta": meta,
                "meta_sha256": digest(meta),
            }
            _write(meta_file, json.dumps(entry, sort_keys=True).encode())

    def forget(self, stage: str, unit: str) -> None:
        """Drop an entry, if there is one."""
        for file in reversed(self._files(stage, unit)):  # the commit mark first
            file.unlink(missing_ok=True)

    def get_patch(self, stage: str, unit: str) -> Patch | None:
        """A patch that `put_patch` wrote."""
        found = self.get(stage, unit)
        return None if found is None else Patch.from_json(found[1]["patch"], found[0])

    def put_patch(self, stage: str, unit: str, patch: Patch) -> None:
        """Write a patch: its plan as meta, its tensors beside."""
        self.put(stage, unit, patch.tensors, {"patch": patch.to_json()})

    def file(self, stage: str, unit: str) -> Path:
        """Where the tensors of an entry lie."""
        return self._files(stage, unit)[0]

    def remove(self) -> None:
        """Remove what is in the directory, and the directory itself if nothing else is left in it
        (and it is nobody's mount point or working directory)."""
        for name in (ENTRIES, SCRATCH):
            shutil.rmtree(self.path / name, ignore_errors=True)
        for name in (HEAD, LOCK):
            (self.path / name).unlink(missing_ok=True)
        with suppress(OSError):
            self.path.rmdir()

    def close(self) -> None:
        """Let others open the directory."""
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _files(self, stage: str, unit: str) -> tuple[Path, Path]:
        # Readable, and distinct whatever the unit is called or how long its name is.
        name = f"{_plain(unit)[-80:]}.{hashlib.sha256(unit.encode()).hexdigest()[:12]}"
        folder = self.path / ENTRIES / f"{_plain(stage)[-80:]}.{digest({'stage': stage})[:6]}"
        return folder / f"{name}.safetensors", folder / f"{name}.json"


def _plain(name: str) -> str:
    return re.sub(r"[^\w.-]", "_", name)


def _write(file: Path, data: bytes) -> None:
    with _beside(file) as beside, open(beside, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


@contextmanager
def _beside(file: Path) -> Iterator[Path]:
    """A name to write to; the file then takes its place."""
    beside = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        yield beside
        beside.replace(file)
    except BaseException:
        beside.unlink(missing_ok=True)  # on a full disk every byte counts
        raise


def _lock(path: Path) -> IO[str]:
    # The lock goes with the process, however it ends; the file may stay.
    lock = open(path / LOCK, "a+")  # noqa: SIM115  (held until close)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        holder = lock.read().strip() or "unknown"
        lock.close()
        raise UserError(
            f"expected the work directory {path} to be free, found another run in it (process "
            f"{holder}): wait for it, or give this one its own --work"
        ) from None
    lock.truncate(0)
    lock.write(f"{os.getpid()}\n")
    lock.flush()
    return lock


def _check_head(path: Path, fingerprint: Mapping[str, str]) -> None:
    head = path / HEAD
    if not head.exists():
        _write(head, json.dumps({"fingerprint": dict(fingerprint)}, indent=1).encode())
        return
    try:
        old = dict(read_json(head)["fingerprint"])
    except (UserError, KeyError, TypeError, ValueError):
        raise UserError(
            f"expected a readable {head}, found it damaged: start over with --fresh"
        ) from None
    keys = sorted({*old, *fingerprint})
    changed = [key for key in keys if old.get(key) != fingerprint.get(key)]
    if changed:
        raise UserError(
            f"expected to go on with the work in {path}, found that {' and '.join(changed)} "
            "changed since: restore it, or start over with --fresh"
        )
