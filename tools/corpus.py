"""The text the embedded model is trained on: permissively licensed Python source on this machine.

Sources are the standard library and the installed packages whose metadata names a permissive
licence. Three rules make the result usable: the evaluation modules and everything that resembles
them stay out (a vendored `ipaddress` would turn held-out text into training text); near-duplicates
are dropped (a model spends no capacity on the fortieth copy of a modelling file); no package fills
more than a fixed share, so that no one style dominates.
"""

import hashlib
import importlib.metadata
import json
import random
import re
import sys
import sysconfig
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from rankine.tasks.embedded import EVALUATION_MODULES, embedded_text, module_files

PERMISSIVE = re.compile(
    r"\b(MIT|MIT-0|MIT-CMU|BSD|0BSD|Apache|PSF|Python Software Foundation|ISC|Zlib|HPND|Unlicense"
    r"|CC0|BSL-1\.0|Boost|CNRI-Python|PostgreSQL)\b",
    re.IGNORECASE,
)
RESTRICTED = re.compile(
    r"\b(A?GPL|LGPL|GNU|MPL|Mozilla|EPL|CDDL|EUPL|SSPL|BUSL|CC-BY-(NC|SA)|proprietary|"
    r"non-?commercial|Sleepycat|CeCILL)",
    re.IGNORECASE,
)
STANDARD_LIBRARY = "python-stdlib"
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "lib2to3", "idlelib", "_vendor"}
MAX_FILE_BYTES = 200_000
MIN_FILE_BYTES = 300
SHINGLE_LINES = 4
DUPLICATE_SHARE = 0.5
HELD_OUT_SHARE = 0.1


@dataclass
class Package:
    """One source of text: what the card says about it, and its candidate files."""

    name: str
    version: str
    licence: str
    files: list[tuple[str, Path]] = field(default_factory=list)


@dataclass
class Document:
    """One accepted file. `name` is portable: package and path, never a path of this machine."""

    package: str
    name: str
    sha256: str
    size: int
    text: str


def licence_of(metadata: "importlib.metadata.PackageMetadata") -> str | None:
    """The permissive licence the metadata names, or None where it is absent or not permissive.

    The SPDX expression wins over the classifiers, and these over the free-form field, of which only
    the first lines count: some packages paste every licence of every bundled file there.
    """
    expression = metadata.get("License-Expression") or ""
    classifiers = [
        line.split("::")[-1].strip()
        for line in metadata.get_all("Classifier") or []
        if line.startswith("License ::") and not line.endswith("OSI Approved")
    ]
    free = " ".join((metadata.get("License") or "").split())[:80]
    named = expression or "; ".join(classifiers) or free
    everything = " ".join((expression, *classifiers, free))
    if not PERMISSIVE.search(named) or RESTRICTED.search(everything):
        return None
    return named


def standard_library() -> Package:
    """The interpreter's own library, tests included, without the evaluation modules."""
    root = Path(sysconfig.get_paths()["stdlib"])
    held_out = {name for module in EVALUATION_MODULES for name in module_files(root, module)}
    held_out |= {f"test/test_{module}.py" for module in EVALUATION_MODULES}
    version = ".".join(map(str, sys.version_info[:3]))
    package = Package(STANDARD_LIBRARY, version, "PSF-2.0")
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if SKIPPED_FOLDERS & set(name.parts) or name.as_posix() in held_out:
            continue
        package.files.append((f"{STANDARD_LIBRARY}/{name.as_posix()}", path))
    return package


def installed_packages() -> tuple[list[Package], list[str]]:
    """Permissively licensed distributions of this interpreter, and the names of the refused."""
    accepted: dict[str, Package] = {}
    refused = []
    for distribution in importlib.metadata.distributions():
        name = (distribution.metadata["Name"] or "").lower()
        if not name or name == "rankine" or name in accepted:
            continue
        licence = licence_of(distribution.metadata)
        if licence is None:
            refused.append(name)
            continue
        package = Package(name, distribution.version, licence)
        for file in distribution.files or ():
            parts = set(file.parts)
            if file.suffix != ".py" or ".." in parts or SKIPPED_FOLDERS & parts:
                continue
            package.files.append((f"{name}/{file.as_posix()}", Path(str(file.locate()))))
        if package.files:
            accepted[name] = package
    return [accepted[name] for name in sorted(accepted)], sorted(refused)


def read_source(path: Path) -> str | None:
    """The text of a file worth learning from: UTF-8, written by hand, neither tiny nor huge."""
    try:
        if not MIN_FILE_BYTES <= path.stat().st_size <= MAX_FILE_BYTES:
            return None
        text = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError):
        return None
    lines = text.split("\n")
    if "\0" in text or max(map(len, lines)) > 1000 or len(text) / len(lines) > 90:
        return None
    head = text[:1500].lower()
    if "do not edit" in head or "autogenerated" in head or "auto-generated" in head:
        return None
    # A table of numbers or a listing of bytes is not a program.
    letters = sum(map(str.isalpha, text[:20_000]))
    return text if letters > 0.4 * min(len(text), 20_000) else None


def shingles(text: str) -> np.ndarray:
    """Hashes of the runs of a few stripped lines, one in four kept by value: enough to compare.

    Sampling by hash value (not by position) makes two files keep the same shingles.
    """
    lines = [line.strip() for line in text.split("\n")]
    codes = np.array([zlib.crc32(line.encode()) for line in lines if len(line) > 3], np.uint64)
    if len(codes) < SHINGLE_LINES:
        return np.zeros(0, np.uint64)
    mixed = np.zeros(len(codes) - SHINGLE_LINES + 1, np.uint64)
    for offset in range(SHINGLE_LINES):
        mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + codes[offset : offset + len(mixed)]
        mixed ^= mixed >> np.uint64(29)
    return np.unique(mixed[mixed % np.uint64(4) == 0])


class DuplicateFilter:
    """Refuses text of which a large share of shingles was seen before, or is held out."""

    def __init__(self, held_out: Iterable[str]):
        self._seen: set[int] = set()
        self._held_out = {int(code) for text in held_out for code in shingles(text)}

    def admit(self, text: str) -> bool:
        codes = [int(code) for code in shingles(text)]
        if not codes:
            return False
        if sum(code in self._held_out for code in codes) > HELD_OUT_SHARE * len(codes):
            return False
        if sum(code in self._seen for code in codes) > DUPLICATE_SHARE * len(codes):
            return False
        self._seen.update(codes)
        return True


def share_cap(sizes: Iterable[int], share: float, budget: int) -> int:
    """The largest bytes per package such that none exceeds `share` of what is then kept."""
    cap, sizes = budget, list(sizes)
    for _ in range(50):
        cap = int(share * min(budget, sum(min(size, cap) for size in sizes)))
    return cap


def collect(
    budget: int, share: float, seed: int
) -> tuple[list[Document], list[Package], list[str]]:
    """At most `budget` bytes of documents in training order, their packages, the refused names."""
    packages, refused = installed_packages()
    packages.insert(0, standard_library())
    duplicates = DuplicateFilter(text for _, text in embedded_text("evaluation"))
    by_package: dict[str, list[Document]] = defaultdict(list)
    for package in packages:
        # Which files of a capped package are kept must not follow the alphabet.
        files = sorted(package.files, key=lambda item: hashlib.sha256(item[0].encode()).digest())
        for name, path in files:
            text = read_source(path)
            if text is None or not duplicates.admit(text):
                continue
            data = text.encode()
            digest = hashlib.sha256(data).hexdigest()
            by_package[package.name].append(Document(package.name, name, digest, len(data), text))
    totals = {name: sum(d.size for d in found) for name, found in by_package.items()}
    cap = share_cap(totals.values(), share, budget)
    scale = min(1.0, budget / sum(min(total, cap) for total in totals.values()))
    documents = []
    for name, found in by_package.items():
        # The standard library is what calibration text looks like: it is kept whole up to the cap.
        room = cap if name == STANDARD_LIBRARY else int(min(totals[name], cap) * scale)
        for document in found:
            if document.size <= room:
                room -= document.size
                documents.append(document)
    random.Random(seed).shuffle(documents)
    used = {document.package for document in documents}
    return documents, [package for package in packages if package.name in used], refused


def write_listing(path: Path, documents: list[Document], packages: list[Package]) -> None:
    """`corpus.json`: packages with versions and licences, files with hashes, in training order."""
    sizes: dict[str, int] = defaultdict(int)
    for document in documents:
        sizes[document.package] += document.size
    listing = {
        "held_out_modules": list(EVALUATION_MODULES),
        "bytes": sum(sizes.values()),
        "packages": [
            {key: value for key, value in asdict(package).items() if key != "files"}
            | {"bytes": sizes[package.name]}
            for package in packages
        ],
        "files": [[document.name, document.sha256] for document in documents],
    }
    head, rows = json.dumps(listing, indent=1).split('"files": ')[0], listing["files"]
    body = ",\n".join("  " + json.dumps(row) for row in rows)
    path.write_text(f'{head}"files": [\n{body}\n ]\n}}\n', encoding="utf-8")


def texts(documents: list[Document], limit: int) -> Iterator[str]:
    """Documents until `limit` bytes have gone by: enough to train a tokenizer on."""
    for document in documents:
        if limit <= 0:
            return
        limit -= document.size
        yield document.text
