"""What a user asks for. One field = one keyword of `rankine.compress` = one CLI option."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from rankine.budget import Budget
from rankine.errors import UserError, suggest
from rankine.limits import YAML_BYTES, parse_yaml, read_text


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Globs = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]


class Stage(BaseModel):
    """One method with its knobs and, in a chain, its own budget."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    set: dict[str, Any] = Field(default_factory=dict)
    keep: float | None = None
    size: int | str | None = None
    bits: float | None = None


class Recipe(BaseModel):
    """Everything that decides the result, and where the work is done."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field("embedded", description="hub id, local directory or `embedded`")
    method: str = Field("auto", description="a method of the catalogue (`rankine methods`)")
    keep: float | None = Field(None, description="stored bits of the targeted weights / 16 each")
    size: int | str | None = Field(None, description='whole checkpoint on disk, "4GB" or bytes')
    bits: float | None = Field(None, description="mean stored bits per targeted weight")
    paper_ratio: float | None = Field(None, description="a paper's own ratio: parameters removed")
    max_loss: str | None = Field(
        None,
        description="the smallest model that holds this: 1.02x (perplexity) or 0.05 (nats)",
        pattern=r"^\s*[0-9]*\.?[0-9]+(e-?[0-9]+)?\s*x?\s*$",
    )
    calibration: str = Field("embedded", description="file, hub data set or `embedded`")
    evaluation: str = Field("embedded", description="file, hub data set or `embedded`")
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
    threads: int | None = Field(None, description="CPU threads (default: all cores)", ge=1)
    seed: int = Field(0, description="of the calibration sample and everything random")
    include: Globs = Field((), description="globs of module paths to compress")
    exclude: Globs = Field((), description="globs of module paths to leave alone")
    fast: bool = Field(False, description="leave dense what would be smaller but not faster here")
    fused: bool = Field(
        False, description="count on decoding through `rankine.load(DIR, fused=True)`"
    )
    work: str | None = Field(None, description="work directory (resumes there)")
    fresh: bool = Field(False, description="start over in the work directory")
    force: bool = Field(False, description="replace an existing output")
    set: dict[str, Any] = Field(default_factory=dict, description="knobs of the method")
    stages: tuple[Stage, ...] = Field((), description="a chain of methods instead of one")

    @classmethod
    def of(cls, **fields: Any) -> Recipe:
        """Validated; a wrong field is one sentence."""
        try:
            return cls(**fields)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"]) or "recipe"
            if first["type"] == "extra_forbidden":
                known = list(cls.model_fields)
                raise UserError(f'unknown option "{place}"; {suggest(place, known)}') from None
            hint = first["msg"]
            if first["type"] == "string_pattern_mismatch":
                hint = cls.model_fields[place].description or hint
            raise UserError(
                f"expected {place} to be valid, found {first.get('input')!r:.80}: {hint}"
            ) from None

    @classmethod
    def read(cls, path: str | Path, **overrides: Any) -> Recipe:
        """From a YAML file (see `rankine.limits`), with command-line overrides on top."""
        data = parse_yaml(read_text(Path(path), YAML_BYTES), path)
        if not isinstance(data, dict):
            raise UserError(f"expected fields in {path}, found {type(data).__name__}")
        if strange := [name for name in data if not isinstance(name, str)]:
            raise UserError(f"expected names of fields in {path}, found {strange[0]!r:.40}")
        return cls.of(**{**data, **overrides})

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
        ratio = self.paper_ratio if not self.stages else None
        return Budget.parse(keep=stage.keep, size=stage.size, bits=stage.bits, paper_ratio=ratio)

    def decides(self) -> dict[str, Any]:
        """The fields that change the result: what the journal's fingerprint covers."""
        places = {"work", "fresh", "force", "threads", "evaluation", "eval_tokens"}
        return self.model_dump(mode="json", exclude=places)
