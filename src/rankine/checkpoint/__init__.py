"""Checkpoints: written beside and then renamed, read by transformers itself, exported elsewhere.

Nothing here imports transformers at its top but `hf`, which is imported while transformers
itself is only half imported (see `rankine._register`).
"""

from rankine.checkpoint.beside import check_output, written_beside
from rankine.checkpoint.given import built, is_own, is_plain, open_given, skeleton
from rankine.checkpoint.journal import Journal
from rankine.checkpoint.load import ModelInfo, directory_bytes, load, open_model
from rankine.checkpoint.meta import open_meta, open_streamed
from rankine.checkpoint.save import is_pretrained, patch_of, remember, save, write, write_card

__all__ = [
    "Journal",
    "ModelInfo",
    "built",
    "check_output",
    "directory_bytes",
    "is_own",
    "is_plain",
    "is_pretrained",
    "load",
    "open_given",
    "open_meta",
    "open_model",
    "open_streamed",
    "patch_of",
    "remember",
    "save",
    "skeleton",
    "write",
    "write_card",
    "written_beside",
]
