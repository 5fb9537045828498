"""Hub ids: found in the local cache or downloaded into it, and from there on directories like any
other, with their headers checked and their weights streamed."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rankine.checkpoint.form import CONFIG, weight_files
from rankine.checkpoint.pickled import pickled_files
from rankine.errors import UserError
from rankine.limits import pickles_allowed

#: What a model is loaded from, beside its own weights: no code, nothing made for other programs.
FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.md")
WEIGHTS = ("model*.safetensors",)
NOTICES = ("LICEN*", "NOTICE*", "COPYING*", "USE_POLICY*")
PICKLES = ("*.bin",)
#: Keywords of transformers that are the hub's too.
PLACES = ("cache_dir", "revision", "token", "local_files_only")
#: A directory of the hub's cache.
SNAPSHOT = re.compile(r"models--(\w[\w.-]*?)(?:--(\w[\w.-]*))?/snapshots/\w+")


def cached(spec: str, **places: Any) -> Path | None:
    """The directory in the local cache that holds the config and all weights of a hub id, None
    where there is none; asks no network. `places`: see `PLACES`."""
    from huggingface_hub import snapshot_download

    try:
        found = Path(snapshot_download(spec, **{**places, "local_files_only": True}))
    except (OSError, ValueError):  # nothing there; no name that the hub could have
        return None
    return found if _whole(found) else None


def fetched(spec: str, **places: Any) -> Path:
    """The same, downloaded first where it is not there, unless HF_HUB_OFFLINE or
    `local_files_only` say otherwise. Raises UserError."""
    if (found := cached(spec, **places)) is not None:
        return found
    place = _downloaded(spec, (*WEIGHTS, *(PICKLES if pickles_allowed() else ())), places)
    if not _whole(place):
        raise UserError(
            f"expected {CONFIG} and model*.safetensors of the hub's {spec}, found no such files in "
            "the cache or on the hub: choose a repository that has them; one with pickles only "
            "(pytorch_model.bin) is read with --allow-pickle, its tensors and no code"
        )
    return place


def described(spec: str) -> Path:
    """A directory with the config and the tokenizer of a hub id, for who needs no weights:
    downloaded, unless HF_HUB_OFFLINE says otherwise. Raises UserError."""
    return _downloaded(spec, (), {})


def _downloaded(spec: str, weights: Sequence[str], places: Mapping[str, Any]) -> Path:
    from huggingface_hub import snapshot_download

    files = [*FILES, *NOTICES, *weights]
    try:
        place = snapshot_download(spec, allow_patterns=files, ignore_patterns="*/*", **places)
    except (OSError, ValueError) as error:
        raise unreachable(spec, error) from None
    return Path(place)


def _whole(directory: Path) -> bool:
    try:
        return (directory / CONFIG).is_file() and bool(
            weight_files(directory) or pickled_files(directory)
        )
    except UserError:  # shards that an index names are missing
        return False


def unreachable(spec: str, error: Exception) -> UserError:
    """The sentence for what the hub or its cache said."""
    gated = type(error).__name__ == "GatedRepoError"
    if gated or type(error).__name__ == "RepositoryNotFoundError":
        what = "a gated one" if gated else "none that can be reached"
        return UserError(
            f'expected "embedded", a model directory or a hub id, found "{spec}", {what}: check '
            "the name, and for a private or gated model ask its owner and log in (hf auth login)"
        )
    first = str(error).strip().split("\n")[0]
    offline = " (offline: HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
    return UserError(
        f'expected "embedded", a model directory or a hub id, found "{spec}", which is none that '
        f"can be reached{offline}: {first}"
    )


def id_of(directory: Path) -> str | None:
    """The hub id whose snapshot a directory is; None for any other."""
    found = SNAPSHOT.search(directory.as_posix())
    return "/".join(filter(None, found.groups())) if found else None
