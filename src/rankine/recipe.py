"""What a user asks for. One field = one keyword of `rankine.compress` = one CLI option."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    ValidationInfo,
)

from rankine import own
from rankine.acceptance import Condition
from rankine.budget import Budget
from rankine.errors import UserError, suggest
from rankine.limits import YAML_BYTES, parse_yaml, read_text


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Texts = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]


def _data(value: Any, info: ValidationInfo) -> Any:
    """A name stays a name; batches that can be read only once are kept."""
    if isinstance(value, str | Path):
        return own.readable(str(value), str(info.field_name))
    if callable(value):
        return value
    found = own.iterable(value, str(info.field_name))
    return list(found) if isinstance(found, Iterator) else found


def _code(value: Any, info: ValidationInfo) -> Any:
    field = str(info.field_name)
    return value if own.is_name(value) else own.function(value, field)


def _metrics(value: Any, info: ValidationInfo) -> Any:
    words = {"no": False, "false": False, "yes": True, "true": True}
    plain = words.get(value.strip().lower(), value) if isinstance(value, str) else value
    return plain if isinstance(plain, bool) else _code(plain, info)


_Marked = PlainSerializer(own.shown, when_used="json")
#: A text source or batches; a function: objects of the user's, or their `package.module:name`.
Data = Annotated[Any, BeforeValidator(_data), _Marked]
Code = Annotated[Any, BeforeValidator(_code), _Marked]
Metrics = Annotated[Any, BeforeValidator(_metrics), _Marked]


def _conditions(value: Any) -> Any:
    value = _as_tuple(value)
    for text in value if isinstance(value, list | tuple) else ():
        Condition.parse(str(text))
    return value


#: Pydantic's names for what is no such thing.
KINDS = {
    **dict.fromkeys(("float_parsing", "float_type"), "a number"),
    **dict.fromkeys(("int_parsing", "int_type", "int_from_float"), "a whole number"),
    **dict.fromkeys(("bool_parsing", "bool_type"), "true or false"),
    "string_type": "text",
}


def _named_code(value: Any) -> Iterator[str]:
    """Every `package.module:name` in a recipe's values, knobs and stages included."""
    if own.is_name(value):
        yield value
    for item in value.values() if isinstance(value, dict) else ():
        yield from _named_code(item)
    for item in value if isinstance(value, list) else ():
        yield from _named_code(item)


class Stage(BaseModel):
    """One method with its knobs and, in a chain, its own budget."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    set: dict[str, Any] = Field(default_factory=dict)
    keep: float | None = None
    size: int | str | None = None
    bits: float | None = None


#: Fields that a chain states stage by stage.
OF_A_STAGE = ("method", "set", "keep", "size", "bits", "paper_ratio")


class Recipe(BaseModel):
    """Everything that decides the result, and where the work is done."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(
        "embedded", description="hub id, local directory, `embedded` or package.module:factory"
    )
    into: Code = Field(
        None, description="package.module:factory of the architecture that a plain MODEL needs"
    )
    method: str = Field("auto", description="a method of the catalogue (`rankine methods`)")
    keep: float | None = Field(
        None, description="stored bits of the targeted weights / 16 each, such as 0.7"
    )
    size: int | str | None = Field(None, description='whole checkpoint on disk, "4GB" or bytes')
    bits: float | None = Field(None, description="mean stored bits per targeted weight")
    paper_ratio: float | None = Field(None, description="a paper's own ratio: parameters removed")
    max_loss: str | None = Field(
        None,
        description="the smallest model that holds this: 1.02x (perplexity) or 0.05 (nats)",
        pattern=r"^\s*[0-9]*\.?[0-9]+(e-?[0-9]+)?\s*x?\s*$",
    )
    calibration: Data = Field(
        "embedded", description="file, hub data set, `embedded` or package.module:batches"
    )
    evaluation: Data = Field(
        "embedded", description="file, hub data set, `embedded` or package.module:batches"
    )
    forward: Code = Field(
        None, description="package.module:name of f(model, batch), for batches of your own"
    )
    loss: Code = Field(
        None, description="package.module:name of f(outputs, batch), one loss per example"
    )
    evaluate: Metrics = Field(
        True, description="package.module:name of f(model) with your figures; no: sizes only"
    )
    accept: Annotated[Texts, BeforeValidator(_conditions)] = Field(
        (), description="what the result must hold, such as auc>=0.80; else exit code 3"
    )
    tokens: str = Field(
        "128x2048",
        description="calibration sequences x length, such as 128x2048",
        pattern=r"^\s*[0-9]+\s*[x×]\s*[0-9]+\s*$",
    )
    eval_tokens: int = Field(50_000, description="held-out tokens to score", ge=0)
    text_column: str | None = Field(None, description="column of a JSONL or Parquet file")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto, cpu or cuda")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="of the stored weights: auto, bfloat16, float16, float32"
    )
    memory: str | None = Field(
        None,
        description='what a run may use, "4GB" (default: most of what is free); a larger model '
        "stays on the disk",
    )
    threads: int | None = Field(None, description="CPU threads (default: all cores)", ge=1)
    seed: int = Field(
        0, description="of the calibration sample and everything random", ge=0, lt=1 << 63
    )
    include: Texts = Field((), description="globs of module paths to compress")
    exclude: Texts = Field((), description="globs of module paths to leave alone")
    fast: bool = Field(False, description="leave dense what would be smaller but not faster here")
    fused: bool = Field(
        False, description="count on decoding through `rankine.load(DIR, fused=True)`"
    )
    work: str | None = Field(None, description="work directory (resumes there)")
    fresh: bool = Field(False, description="start over in the work directory")
    force: bool = Field(False, description="replace an existing output")
    allow_pickle: bool = Field(
        False, description="read weights in pickles (.bin, .pt): their tensors, no code"
    )
    set: dict[str, Any] = Field(default_factory=dict, description="knobs of the method")
    stages: tuple[Stage, ...] = Field((), description="a chain of methods instead of one")

    @classmethod
    def of(cls, **fields: Any) -> Recipe:
        """Validated; a wrong field is one sentence."""
        try:
            made = cls(**fields)
        except ValidationError as error:
            first = error.errors()[0]
            # Behind the field pydantic names the branch of a union, too: size.int.
            loc = first["loc"][: 3 if first["loc"][:1] == ("stages",) else 1]
            place = ".".join(map(str, loc)) or "recipe"
            if first["type"] == "extra_forbidden":
                known = list(cls.model_fields)
                raise UserError(f'unknown option "{place}"; {suggest(place, known)}') from None
            what, hint = KINDS.get(first["type"], "valid"), first["msg"]
            if first["type"] in {*KINDS, "string_pattern_mismatch"} and place in cls.model_fields:
                hint = cls.model_fields[place].description or hint
            raise UserError(
                f"expected {place} to be {what}, found {first.get('input')!r:.80}: {hint}"
            ) from None
        outside = [name for name in OF_A_STAGE if fields.get(name) not in (None, {})]
        if made.stages and outside:
            raise UserError(
                f"expected the {outside[0]} of a chain in its stages, found one beside them: every "
                "stage has its own"
            )
        return made

    @classmethod
    def read(cls, path: str | Path, *, allow_code: bool = False, **overrides: Any) -> Recipe:
        """From a YAML file (see `rankine.limits`), with command-line overrides on top. The file may
        be a stranger's: what would import code, or read pickles, is refused unless the user says
        so, `allow_code` or `allow_pickle` beside it."""
        data = parse_yaml(read_text(Path(path), YAML_BYTES), path)
        if not isinstance(data, dict):
            raise UserError(f"expected fields in {path}, found {type(data).__name__}")
        if strange := [name for name in data if not isinstance(name, str)]:
            raise UserError(f"expected names of fields in {path}, found {strange[0]!r:.40}")
        own_words = {name: value for name, value in data.items() if name not in overrides}
        if not allow_code and (code := next(_named_code(own_words), None)) is not None:
            raise UserError(
                f"expected no code in {path}, found {code}, which would be imported and run: read "
                "the recipe and that code, then add --allow-code, or name it on the command line"
            )
        if own_words.get("allow_pickle"):
            raise UserError(
                f"expected no allow_pickle in {path}, found it: say so yourself, with "
                "--allow-pickle beside --recipe"
            )
        return cls.of(**{**data, **overrides})

    def given(self, *without: str) -> dict[str, Any]:
        """The fields that were given, as they were given."""
        return {n: getattr(self, n) for n in self.model_fields_set if n not in without}

    def conditions(self) -> list[Condition]:
        """`accept`, read."""
        return [Condition.parse(text) for text in self.accept]

    def write(self, path: str | Path) -> None:
        """To YAML; fields at their default are left out."""
        data = self.model_dump(mode="json", exclude_defaults=True)
        Path(path).write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")

    def chain(self) -> tuple[Stage, ...]:
        """The stages; a plain recipe is a chain of one."""
        if self.stages:
            return self.stages
        return (
            Stage(method=self.method, set=self.set, keep=self.keep, size=self.size, bits=self.bits),
        )

    def budget(self, stage: Stage) -> Budget | None:
        """The stage's budget; None when none is given (the reverse question, a fixed size)."""
        given = (stage.keep, stage.size, stage.bits, self.paper_ratio)
        if all(value is None for value in given):
            return None
        return Budget.parse(
            keep=stage.keep, size=stage.size, bits=stage.bits, paper_ratio=self.paper_ratio
        )

    def decides(self) -> dict[str, Any]:
        """The fields that change the result: what the journal's fingerprint covers. Functions are
        known there by what they do, not by what they are called."""
        places = {"work", "fresh", "force", "threads", "memory", "allow_pickle"}
        figures = {"evaluation", "eval_tokens", "evaluate", "accept"}
        return self.model_dump(mode="json", exclude=places | figures | {"forward", "loss"})
