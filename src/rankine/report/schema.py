"""What report.json holds. Only `schema`, `model` and `rows` must be there: partial runs render too.

Units: bytes are whole files on disk, `keep` is stored bits ÷ (16 × weights) of the targeted
weights, perplexity is exp(nats per token) on held-out text, seconds are wall clock. A number that
could not be measured is absent or null; NaN and infinities become null.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, TypedDict, cast

from rankine.errors import UserError
from rankine.limits import JSON_BYTES, parse_json, read_text

#: major.minor: a newer minor version only adds fields.
SCHEMA = "1.2"
FILE = "report.json"


class Model(TypedDict, total=False):
    """The model as it was before."""

    name: str
    family: str
    parameters: int
    bytes: int
    dtype: str


class Plan(TypedDict, total=False):
    """What was predicted before any work."""

    bytes: int
    seconds: float
    memory: int
    runs_on: list[str]
    notes: list[str]


class BudgetReport(TypedDict, total=False):
    """What was asked (`{"keep": 0.7}`) and what was measured on the saved files."""

    asked: dict[str, Any]
    keep: float
    bits: float
    size: int
    note: str | None


class Row(TypedDict, total=False):
    """One line of the table and one point of the trade-off curve.

    `kind` says what it is: the dense model, a result of Rankine, or a baseline (plain
    quantization). `keep` and `accuracy` are fractions, `perplexity_interval` is its 95 % interval,
    `ratio_to_dense` is tokens_per_second ÷ that of the dense row. `loss` is the mean of the user's
    own loss, `metrics` holds the user's own figures by name; `accepted` says whether the row holds
    what `accept` asked, where something was.
    """

    name: str
    method: str
    kind: Literal["dense", "result", "baseline"]
    keep: float | None
    bytes: int | None
    perplexity: float | None
    perplexity_interval: Sequence[float] | None
    bits_per_byte: float | None
    accuracy: float | None
    tokens_per_second: float | None
    ratio_to_dense: float | None
    loss: float | None
    metrics: dict[str, float | None]
    accepted: bool
    note: str | None


class TargetReport(TypedDict, total=False):
    """One target: where it is, what it became, what that cost.

    A target of several weights has the path, role and block of its first one, and `blocks` names
    those of all. `shape` is (out, in) of what was fitted; `structure` the chosen structure's JSON;
    `bits` all its stored bits; `loss` the predicted increase of the task loss; `error` the relative
    error in the method's metric (0: exact, 1: nothing left). `spectrum` holds at most 64 singular
    values in that metric, the largest being 1, and `spectrum_ranks` their indices, counted from 0.
    """

    id: str
    path: str
    role: str
    block: int | None
    blocks: Sequence[int]
    shape: Sequence[int]
    structure: dict[str, Any]
    rank: int | None
    keep: float
    bits: int
    loss: float | None
    error: float | None
    spectrum: Sequence[float]
    spectrum_ranks: Sequence[int]


class Sample(TypedDict, total=False):
    """What the model wrote before and after, from the same prompt, greedily."""

    prompt: str
    before: str
    after: str


class _Required(TypedDict):
    schema: str
    model: Model
    rows: list[Row]


class Report(_Required, total=False):
    """The whole of report.json.

    `subject` is the name of the row that the headline speaks of; without it, the first result.
    `bytes` says where the bytes of the result went (`{"embedding": n, "q": n, ...}`), and
    `bytes_before` the same for the dense model.
    """

    rankine: str
    created: str
    command: str | None
    subject: str
    recipe: dict[str, Any]
    fingerprints: dict[str, str]
    plan: Plan
    budget: BudgetReport
    targets: list[TargetReport]
    bytes: dict[str, int]
    bytes_before: dict[str, int]
    samples: list[Sample]
    hardware: dict[str, Any]
    versions: dict[str, str]
    times: dict[str, float]
    warnings: list[str]


#: Fields that hold a list of objects, an object, or a list of lines.
_TABLES = ("rows", "targets", "samples")
_OBJECTS = (
    *("model", "recipe", "fingerprints", "plan", "budget"),
    *("bytes", "bytes_before", "hardware", "versions", "times"),
)


#: What the page goes through inside of them.
_INSIDE = (
    *(("targets", name, list) for name in ("shape", "blocks", "spectrum", "spectrum_ranks")),
    *(("plan", name, list) for name in ("runs_on", "notes")),
    ("budget", "asked", dict),
)


def clean(value: Any) -> Any:
    """JSON values only: NaN and infinities become None, numpy scalars numbers, paths strings."""
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((clean(item) for item in value), key=str)
    if hasattr(value, "tolist"):  # a numpy array, a numpy bool, a tensor
        return clean(value.tolist())
    return str(value)


def parse(data: Mapping[str, Any]) -> Report:
    """A clean report, every table and object of which is one (empty where absent).

    Raises:
        UserError: when a required field is missing, a field has the wrong shape, or the schema's
            major version is newer than ours.
    """
    report = clean(data)
    for field in ("schema", "model", "rows"):
        if report.get(field) is None:
            raise UserError(f'expected "{field}" in the report, found none: run the job again')
    major = str(report["schema"]).partition(".")[0]
    if not major.isdigit() or int(major) > int(SCHEMA.partition(".")[0]):
        raise UserError(
            f'expected a report of schema {SCHEMA} or older, found "{report["schema"]!s:.20}": '
            "upgrade rankine to read it"
        )
    for field in (*_TABLES, "warnings"):
        report[field] = _expect(report, field, list)
    for field in _OBJECTS:
        report[field] = _expect(report, field, dict)
    for field in _TABLES:
        if not all(isinstance(item, dict) for item in report[field]):
            raise UserError(f'expected objects in "{field}" of the report, found other values')
    for field, inner, kind in _INSIDE:
        for item in report[field] if field in _TABLES else [report[field]]:
            if item.get(inner) is not None:
                _expect(item, inner, kind)
    report["warnings"] = list(map(str, report["warnings"]))
    return cast(Report, report)


def _expect(owner: dict[str, Any], field: str, kind: type) -> Any:
    value = owner.get(field)
    if value is None:
        return kind()
    if not isinstance(value, kind):
        what = "a list" if kind is list else "an object"
        raise UserError(f'expected {what} in "{field}" of the report, found {type(value).__name__}')
    return value


def dumps(data: Mapping[str, Any]) -> str:
    """The text of report.json."""
    return json.dumps(clean(data), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def read(directory: str | Path) -> dict[str, Any]:
    """The report.json of a finished run (or of a path to the file). Raises UserError."""
    path = Path(directory)
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise UserError(
            f"expected a {FILE} at {path}, found none: name a directory that `rankine compress` "
            "wrote"
        )
    data = parse_json(read_text(path, JSON_BYTES), path, any_text=True)  # what models say, too
    if not isinstance(data, dict):
        raise UserError(f"expected a JSON object in {path}, found {type(data).__name__}")
    return data
