"""Where text comes from: "embedded", files, hub data sets, a list of strings. Read as a stream.

A gigabyte is not read where a few hundred thousand tokens are wanted.
"""

from __future__ import annotations

import codecs
import gzip
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from rankine.errors import UserError

PLAIN = (".txt", ".py", ".md")
ROWS = (".jsonl", ".json", ".parquet")
KNOWN = (*PLAIN, *ROWS)

#: Bytes of a text file handed on at once, cut at a line end.
BLOCK = 1 << 18
#: Bytes of the longest line of JSON, and of the largest file that is one JSON value: these are
#: read whole.
LINE, WHOLE = 1 << 26, 1 << 28

Source = str | Path | Iterable[str]


class Passage(NamedTuple):
    """A piece of a document; `final` marks the document's last one."""

    text: str
    final: bool = True


def passages(
    source: Source, split: str = "calibration", column: str | None = None
) -> Iterator[Passage]:
    """The documents of a source, lazily.

    `source` is "embedded", a file (text, .jsonl, .json, .parquet, each also .gz), a hub data set
    ("owner/name" or "owner/name:config"; only where no such path exists), or strings. `column`
    names the text in rows: default "text", or the only column of strings. Raises UserError.
    """
    if not isinstance(source, (str, Path)):
        return _nonempty((Passage(text) for text in source if text), "the list of texts")
    if source == "embedded":
        return _embedded(split)
    if is_file(source):
        path = Path(source).expanduser()
        return _nonempty(_file(path, column), str(path))
    return _nonempty(_hub(str(source), split, column), str(source))


def _embedded(split: str) -> Iterator[Passage]:
    from rankine.tasks.embedded import embedded_text

    own = "evaluation" if split == "evaluation" else "calibration"
    return (Passage(source) for _, source in embedded_text(own) if source)


def _nonempty(found: Iterator[Passage], name: str) -> Iterator[Passage]:
    first = next(found, None)
    if first is None:
        raise UserError(f"expected text in {name}, found none")
    yield first
    yield from found


# -- files -----------------------------------------------------------------------------------------
def is_file(source: str | Path) -> bool:
    """Is this a path (there or not), and not "embedded" or the name of a hub data set?"""
    name = str(source)
    if name == "embedded":
        return False
    return isinstance(source, Path) or Path(name).expanduser().exists() or _reads_like_a_path(name)


def _reads_like_a_path(name: str) -> bool:
    return (
        name.startswith(("/", ".", "~"))
        or name.removesuffix(".gz").endswith(KNOWN)
        or name.count("/") > 1
    )


def _file(path: Path, column: str | None) -> Iterator[Passage]:
    if path.is_dir():
        raise UserError(f"expected a text file, found the directory {path}: name a file in it")
    if not path.exists():
        raise UserError(f"expected a text file at {path}, found nothing there")
    kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if kind not in KNOWN:
        raise UserError(
            f'expected a file ending in {", ".join(KNOWN)} (or .gz), found "{path.name}"'
        )
    readers = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet}
    try:
        if path.stat().st_size == 0:
            raise UserError(f"expected text in {path}, found an empty file")
        if kind in PLAIN:
            yield from _plain(path)
        else:
            rows = readers[kind](path)
            yield from _column(rows, column, str(path))
    except UnicodeDecodeError as error:
        raise UserError(
            f"expected UTF-8 text in {path}, found the byte 0x{error.object[error.start]:02x}, "
            "which is none: convert the file first"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path) if path.suffix == ".gz" else path.open("rb"))


def _plain(path: Path) -> Iterator[Passage]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    waiting = ""
    with _open(path) as file:
        while block := file.read(BLOCK):
            if b"\0" in block:
                raise UserError(f"expected text in {path}, found a binary file")
            waiting += decoder.decode(block)
            # One block stays back, so that the last passage is known to be the last.
            while len(waiting) > 2 * BLOCK:
                end = _end(waiting)
                yield Passage(waiting[:end], final=False)
                waiting = waiting[end:]
    waiting += decoder.decode(b"", final=True)
    if waiting.strip():
        yield Passage(waiting)


def _end(text: str, start: int = 0) -> int:
    """Where a block that begins at `start` ends: behind a line, or a word, if there is one."""
    block = start, start + BLOCK
    return text.rfind("\n", *block) + 1 or text.rfind(" ", *block) + 1 or block[1]


def _jsonl(path: Path) -> Iterator[Any]:
    with _open(path) as file:
        for number in itertools.count(1):
            if not (line := file.readline(LINE + 1)):
                return
            if len(line) > LINE:
                raise UserError(
                    f"expected lines of at most {LINE:,} bytes in {path}, found more in line "
                    f"{number}: give one document per line"
                )
            if line.strip():
                yield _parse(line, f"line {number} of {path}")


def _json(path: Path) -> Iterator[Any]:
    with _open(path) as file:
        raw = file.read(WHOLE + 1)
    if len(raw) > WHOLE:
        raise UserError(
            f"expected at most {WHOLE:,} bytes of JSON in {path}, which is read whole, found more: "
            "write it as .jsonl, one document per line"
        )
    content = _parse(raw, str(path))
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        content = lists[0] if len(lists) == 1 else [content]
    yield from content if isinstance(content, list) else [content]


def _parse(raw: bytes, where: str) -> Any:
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:  # ValueError: also a number of 5,000 digits
        raise UserError(f"expected JSON in {where}: {error}") from None


def _parquet(path: Path) -> Iterator[Any]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        for batch in file.iter_batches(batch_size=256):
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"expected a parquet file at {path}: {str(error)[:120]}") from None


# -- rows ------------------------------------------------------------------------------------------
def _column(rows: Iterable[Any], column: str | None, where: str) -> Iterator[Passage]:
    chosen = column
    for row in rows:
        if isinstance(row, str):
            text: Any = row
        elif isinstance(row, dict):
            chosen = _choose(row, chosen, where)
            text = row[chosen]
        else:
            raise UserError(f"expected objects or strings in {where}, found a {type(row).__name__}")
        if text is None or text == "":
            continue
        if not isinstance(text, str):
            raise UserError(
                f'expected text in column "{chosen}" of {where}, found a {type(text).__name__}'
            )
        # A lone surrogate (legal in JSON) is no text a tokenizer could take.
        yield from _pieces(
            text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")
        )


def _pieces(text: str) -> Iterator[Passage]:
    """A document in passages of at most a block."""
    start = 0
    while len(text) - start > BLOCK:
        end = _end(text, start)
        yield Passage(text[start:end], final=False)
        start = end
    yield Passage(text[start:])


def _choose(row: dict[str, Any], column: str | None, where: str) -> str:
    if column is not None:
        if column not in row:
            raise UserError(
                f'expected a column "{column}" in {where}, found: {", ".join(sorted(row))}'
            )
        return column
    strings = [name for name, value in row.items() if isinstance(value, str)]
    if "text" in row:
        return "text"
    if len(strings) != 1:
        raise UserError(
            f'expected a column "text" in {where}, found: {", ".join(sorted(row))}; '
            "name one with text_column"
        )
    return strings[0]


# -- hub data sets ---------------------------------------------------------------------------------
HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?(:[\w.-]+)?$")


def _hub(name: str, split: str, column: str | None) -> Iterator[Passage]:
    if not HUB_ID.match(name):
        raise UserError(f'expected a file, a hub data set or "embedded", found "{name}"')
    from datasets import load_dataset

    repo, _, config = name.partition(":")
    try:
        parts = load_dataset(repo, config or None, streaming=True)
    except Exception as error:  # datasets raises a dozen types for "not there" and "no network"
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        offline = " (offline: HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise UserError(
            f'expected a file or a hub data set, found "{name}", no file here and no hub data set '
            f"in reach{offline}: {reason}"
        ) from None
    wanted = ("test", "validation", "train") if split == "evaluation" else ("train", "test")
    chosen = next((part for part in wanted if part in parts), next(iter(parts)))
    yield from _column(_reached(parts[chosen], name), column, name)


def _reached(rows: Iterable[Any], name: str) -> Iterator[Any]:
    """The rows of a hub data set, as far as the network brings them."""
    try:
        yield from rows
    except Exception as error:  # datasets lets through what its dozen file systems raise
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise UserError(
            f'expected all rows of the hub data set "{name}", found that it ended early: {reason}'
        ) from None
