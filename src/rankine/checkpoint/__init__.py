"""Checkpoints: written beside and then renamed, read by transformers itself, exported elsewhere.

Nothing here imports transformers at its top but `hf`, which is imported while transformers
itself is only half imported (see `rankine._register`).
"""

from rankine.checkpoint.beside import check_output, written_beside
from rankine.checkpoint.journal import Journal
from rankine.checkpoint.load import ModelInfo, directory_bytes, load, open_model
from rankine.checkpoint.meta import open_meta
from rankine.checkpoint.save import patch_of, save, write, write_card

__all__ = [
    "Journal",
    "ModelInfo",
    "check_output",
    "directory_bytes",
    "load",
    "open_meta",
    "open_model",
    "patch_of",
    "save",
    "write",
    "write_card",
    "written_beside",
]
