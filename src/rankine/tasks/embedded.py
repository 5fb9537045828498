"""The small language model in the package, and the text that belongs to it.

The text is not shipped: it is the standard library of the interpreter that runs us, so it is there
on every machine, offline, in a licence that allows it. Two fixed lists of modules keep the splits
apart: the evaluation modules (and whatever resembles them) were held out when the model was
trained, the calibration modules may have been seen. All of them exist in CPython 3.11 to 3.14, so
the splits mean the same everywhere; their exact bytes follow the interpreter's version.
"""

import hashlib
import sysconfig
from pathlib import Path

from rankine.errors import UserError

EVALUATION_MODULES: tuple[str, ...] = (
    "argparse",
    "configparser",
    "dataclasses",
    "difflib",
    "fractions",
    "ftplib",
    "heapq",
    "http",
    "ipaddress",
    "json",
    "mailbox",
    "shutil",
    "statistics",
    "subprocess",
    "tarfile",
    "textwrap",
    "threading",
    "urllib",
    "zipfile",
)

CALIBRATION_MODULES: tuple[str, ...] = (
    "ast",
    "calendar",
    "codecs",
    "collections",
    "contextlib",
    "copy",
    "csv",
    "doctest",
    "email",
    "enum",
    "functools",
    "inspect",
    "logging",
    "optparse",
    "pickle",
    "random",
    "selectors",
    "shlex",
    "socket",
    "tempfile",
    "tokenize",
    "traceback",
    "unittest",
    "weakref",
    "xml",
)

_SPLITS = {"evaluation": EVALUATION_MODULES, "calibration": CALIBRATION_MODULES}


def embedded_model_dir() -> Path:
    """The directory of the model shipped in the package, as `from_pretrained` takes it."""
    return Path(__file__).resolve().parents[1] / "assets" / "embedded"


def embedded_text(split: str) -> list[tuple[str, str]]:
    """The files of `split` ("calibration" or "evaluation") as (name, source), in a fixed order.

    The order follows a hash of the name, so that any prefix is a mixture of modules: a short
    calibration run would otherwise see nothing but the first module of the alphabet.
    """
    if split not in _SPLITS:
        raise UserError(f'expected the split "calibration" or "evaluation", found "{split}"')
    root = Path(sysconfig.get_paths()["stdlib"])
    names = [name for module in _SPLITS[split] for name in module_files(root, module)]
    names.sort(key=lambda name: hashlib.sha256(name.encode()).digest())
    return [(name, (root / name).read_text(encoding="utf-8")) for name in names]


def module_files(root: Path, module: str) -> list[str]:
    """The source files of one top-level module below `root`, without the tests packed with it."""
    if (root / f"{module}.py").is_file():
        return [f"{module}.py"]
    found = [path.relative_to(root) for path in sorted((root / module).rglob("*.py"))]
    names = [path.as_posix() for path in found if not {"test", "tests"} & set(path.parts)]
    if not names:
        raise UserError(
            f'expected the source of the standard library module "{module}" in {root}, found none: '
            "use an interpreter that ships its standard library as .py files, or give your own text"
        )
    return names
