"""`python -m benchmarks.claims [SYSTEM ...] [--full]`: measure, write claims.json and docs."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from pathlib import Path

import typer

import benchmarks.claims as package
from benchmarks.claims import pages
from benchmarks.claims.harness import Lab, write_rows

NOT_CLAIMS = {"harness", "pages", "encoder", "clicks", "__main__"}


def systems() -> list[str]:
    """Every claim module."""
    found = [m.name for m in pkgutil.iter_modules(package.__path__)]
    return [name for name in found if name not in NOT_CLAIMS]


def main(
    names: list[str] = typer.Argument(None, help="systems; all without"),  # noqa: B008
    full: bool = typer.Option(False, help="the specification's own size"),
    model: str = typer.Option("embedded", help="the model to measure on"),
    data: Path = typer.Option(  # noqa: B008
        None, envvar="RANKINE_DATA", help="folder of real data sets, for the claims that need them"
    ),
    docs: bool = typer.Option(False, help="only write the pages from the results"),
    check: bool = typer.Option(False, help="fail when a page is stale"),
) -> None:
    """Re-measure the claims."""
    if docs or check:
        sys.exit(pages.write(check))
    failed = []
    for name in names or systems():
        module = importlib.import_module(f"benchmarks.claims.{name}")
        lab = Lab(name, full=full, model=model, data=data)
        print(f"{name}: {module.TITLE} [{lab.profile}]")
        rows = module.claims(lab)
        command = f"make claims SYSTEM={name}" + (" FULL=1" if full else "")
        write_rows(lab, rows, command)
        for row in rows:
            mark = "holds" if row.holds else "FAILS"
            print(f"  {mark}  {row.budget}: {row.claim}: {row.value:.4g} ({row.unit})")
        failed += [row for row in rows if row.rule == "assert" and not row.holds]
    pages.write()
    if failed:
        print(f"{len(failed)} asserted claims failed")
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
