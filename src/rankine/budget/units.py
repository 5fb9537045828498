"""One vocabulary for sizes: `keep`, `size` and `bits`.

* `keep=0.7`: stored bits of the targeted weights / (16 x their number), metadata included;
* `size="4GB"`: the whole checkpoint on disk, in bytes;
* `bits=3.5`: mean stored bits per targeted weight.

A ratio from a paper, the fraction of parameters *removed*, is accepted as `paper_ratio` and
becomes `keep`; `Budget.note` says so, for the report.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction
from math import isfinite
from numbers import Real
from typing import Any

from rankine.errors import BudgetError, UserError

DENSE_BITS = 16  # bits per weight in the denominator of `keep`, whatever the model is stored in

_UNITS = {
    "": 1,
    "b": 1,
    **{f"{p}b": 1000 ** (i + 1) for i, p in enumerate("kmgt")},
    **{f"{p}ib": 1024 ** (i + 1) for i, p in enumerate("kmgt")},
}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-z]*)\s*", re.IGNORECASE)
_SIZE_HELP = "Write a number of bytes or a number with a unit, such as 4GB, 1.5GB or 700MiB."


@dataclass(frozen=True)
class Budget:
    """How large the result may be: exactly one of `keep`, `size` and `bits` is set.

    Attributes:
        keep: stored bits of the targeted weights / (16 x their number), in (0, 1].
        size: bytes of the whole checkpoint on disk.
        bits: mean stored bits per targeted weight, in (0, 32].
        note: how the value was derived when the user gave another one; not compared.

    Raises:
        UserError: when none or two are set, or the value is out of range.
    """

    keep: float | None = None
    size: int | None = None
    bits: float | None = None
    note: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        given = {
            name: value
            for name in ("keep", "size", "bits")
            if (value := getattr(self, name)) is not None
        }
        _exactly_one(given)
        if self.keep is not None:
            _within("keep", self.keep, 1.0, "0.7 stores 70 % of the bits of the dense weights")
        if self.bits is not None:
            _within("bits", self.bits, 32.0, "3.5 stores 3.5 bits per weight on average")
        if self.size is not None and self.size <= 0:
            raise UserError(f"size must be more than 0 bytes, found {self.size}. {_SIZE_HELP}")

    @classmethod
    def parse(
        cls, *, keep: Any = None, size: Any = None, bits: Any = None, paper_ratio: Any = None
    ) -> Budget:
        """Build a budget from what a user typed: numbers, or strings from a CLI or YAML.

        Args:
            keep: fraction of the dense bits to store.
            size: bytes, or a string such as "4GB".
            bits: mean bits per targeted weight.
            paper_ratio: fraction of the parameters removed, as most papers count, in [0, 1).

        Raises:
            UserError: in one or two sentences, for anything that is not a budget.
        """
        given = {"keep": keep, "size": size, "bits": bits, "paper_ratio": paper_ratio}
        given = {name: value for name, value in given.items() if value is not None}
        _exactly_one(given)
        if size is not None:
            return cls(size=parse_size(size))
        if bits is not None:
            return cls(bits=_number("bits", bits, "3.5 bits per weight"))
        if keep is not None:
            return cls(keep=_number("keep", keep, "0.7 for 70 % of the dense bits"))
        ratio = _number("paper_ratio", paper_ratio, "0.2 for 20 % of the parameters removed")
        if not 0.0 <= ratio < 1.0:
            raise UserError(
                f"paper_ratio must be at least 0 and below 1, found {ratio:g}. It is the fraction "
                f"of the parameters removed: 0.2 removes 20 % and keeps 80 %."
            )
        kept = float(1 - Fraction(repr(ratio)))
        return cls(
            keep=kept, note=f"paper ratio {ratio:g} (fraction removed) read as keep {kept:g}"
        )

    def total_bits(self, weights: int, fixed_bytes: int = 0) -> int:
        """Bits that the targets may take together.

        Args:
            weights: number of targeted weights.
            fixed_bytes: everything else on disk (other tensors, headers, tokenizer); counts
                only for `size`, as `keep` and `bits` speak of the targets alone.

        Raises:
            BudgetError: when `size` leaves nothing for the targets.
        """
        if self.size is not None:
            if self.size <= fixed_bytes:
                raise BudgetError(
                    f"size is {format_bytes(self.size)}, but what is not compressed takes "
                    f"{format_bytes(fixed_bytes)} already. Ask for more than "
                    f"{format_bytes(fixed_bytes)} or add more layers to the targets."
                )
            return 8 * (self.size - fixed_bytes)
        per_weight = self.bits if self.bits is not None else self.keep
        unit = 1 if self.bits is not None else DENSE_BITS
        # Through the decimal the user typed: in floats 0.7 x 16 x 10^k may fall one bit short.
        return int(Fraction(repr(float(per_weight or 0.0))) * unit * weights)


def parse_size(text: Any, name: str = "size") -> int:
    """Bytes of "1.5GB", "700MiB", "4096" or a plain number; `name` is what errors call it.

    kB, MB, GB and TB are powers of 1000; KiB, MiB, GiB and TiB powers of 1024; case is ignored.

    Raises:
        UserError: for anything else, including zero and negative sizes.
    """
    if isinstance(text, str):
        match = _SIZE.fullmatch(text)
        if match is None or match[2].lower() not in _UNITS:
            raise UserError(f"{name} must be an amount of bytes, found '{text}'. {_SIZE_HELP}")
        size = int(Fraction(match[1].rstrip(".")) * _UNITS[match[2].lower()])
    else:
        size = int(_number(name, text, "4GB"))
    if size <= 0:
        raise UserError(f"{name} must be more than 0 bytes, found {text}. {_SIZE_HELP}")
    return size


def format_bytes(count: float) -> str:
    """A size for people, with three significant digits and decimal units: "1.50 GB"."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if abs(value) < 999.5:  # 999.6 kB would round to "1000 kB"
            break
        value, unit = value / 1000, larger
    if unit == "B":
        return f"{value:.0f} B"
    decimals = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{decimals}f} {unit}"


def _exactly_one(given: dict[str, Any]) -> None:
    if len(given) != 1:
        found = " and ".join(f"{name}={value}" for name, value in given.items()) or "none"
        raise UserError(
            f"A budget is exactly one of keep, size and bits, found {found}. "
            f"Give one, such as keep=0.7, size=4GB or bits=3.5."
        )


def _number(name: str, value: Any, example: str) -> float:
    number = float("nan")
    if isinstance(value, (Real, str)) and not isinstance(value, bool):
        with suppress(ValueError):  # reported below, with the text as the user wrote it
            number = float(value)
    if not isfinite(number):
        raise UserError(f"{name} must be a number, found '{value}'. For example: {example}.")
    return number


def _within(name: str, value: float, most: float, meaning: str) -> None:
    if not 0.0 < value <= most:  # NaN fails too
        raise UserError(
            f"{name} must be more than 0 and at most {most:g}, found {value:g}. "
            f"For example, {name} {meaning}."
        )
