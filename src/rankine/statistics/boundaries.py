"""The hidden states before each block, kept for the way back: in memory while they are small,
then in files. Last in, first out."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import TracebackType

from safetensors.torch import load_file, save_file
from torch import Tensor

from rankine.checkpoint.beside import disk_errors

#: Bytes that may wait in memory.
IN_MEMORY = 1 << 30


class Boundaries:
    """A stack of lists of tensors; a context manager that removes its files, which lie below
    `scratch` (default: where the system keeps temporary files)."""

    def __init__(self, in_memory: int = IN_MEMORY, scratch: Path | None = None) -> None:
        self._left = in_memory
        self._scratch = scratch or Path(tempfile.gettempdir())
        self._stack: list[list[Tensor] | Path] = []
        self._directory: tempfile.TemporaryDirectory[str] | None = None

    def append(self, hidden: list[Tensor]) -> None:
        """Put one boundary (a tensor per batch) on the stack."""
        size = sum(h.numel() * h.element_size() for h in hidden)
        if size <= self._left:
            self._left -= size
            self._stack.append(list(hidden))
            return
        if self._directory is None:
            with disk_errors(self._scratch):
                self._directory = tempfile.TemporaryDirectory(
                    prefix="rankine-boundaries-", dir=self._scratch
                )
        file = Path(self._directory.name) / f"{len(self._stack)}.safetensors"
        # Clones: slices of one input share their storage, which safetensors refuses.
        with disk_errors(file.parent):
            save_file({str(n): h.cpu().clone() for n, h in enumerate(hidden)}, file)
        self._device = hidden[0].device  # brought back to where they came from
        self._stack.append(file)

    def pop(self) -> list[Tensor]:
        """The boundary last put there."""
        top = self._stack.pop()
        if isinstance(top, list):
            self._left += sum(h.numel() * h.element_size() for h in top)
            return top
        tensors = load_file(top, device=str(self._device))
        top.unlink()
        return [tensors[str(n)] for n in range(len(tensors))]

    def __enter__(self) -> Boundaries:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.clear()
        if self._directory is not None:
            self._directory.cleanup()
