"""`python -m benchmarks.claims [SYSTEM ...] [--full]`: measure, write claims.json and docs."""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
from pathlib import Path

import typer

import benchmarks.claims as package
from benchmarks.claims.harness import RESULTS, ROOT, Lab, write_rows

DOCS = ROOT / "docs" / "claims.md"
NOT_CLAIMS = {"harness", "__main__"}


def systems() -> list[str]:
    """Every claim module."""
    found = [m.name for m in pkgutil.iter_modules(package.__path__)]
    return [name for name in found if name not in NOT_CLAIMS]


def main(
    names: list[str] = typer.Argument(None, help="systems; all without"),  # noqa: B008
    full: bool = typer.Option(False, help="the specification's own size"),
    model: str = typer.Option("embedded", help="the model to measure on"),
    docs: bool = typer.Option(False, help="only write docs/claims.md from the results"),
    check: bool = typer.Option(False, help="fail when docs/claims.md is stale"),
) -> None:
    """Re-measure the claims."""
    if docs or check:
        sys.exit(write_docs(check))
    failed = []
    for name in names or systems():
        module = importlib.import_module(f"benchmarks.claims.{name}")
        lab = Lab(name, full=full, model=model)
        print(f"{name}: {module.TITLE} [{lab.profile}]")
        rows = module.claims(lab)
        command = f"make claims SYSTEM={name}" + (" FULL=1" if full else "")
        write_rows(lab, rows, command)
        for row in rows:
            mark = "holds" if row.holds else "FAILS"
            print(f"  {mark}  {row.budget}: {row.claim}: {row.value:.4g} ({row.unit})")
        failed += [row for row in rows if row.rule == "assert" and not row.holds]
    write_docs(False)
    if failed:
        print(f"{len(failed)} asserted claims failed")
        sys.exit(1)


def write_docs(check: bool) -> int:
    """docs/claims.md: the fullest row of each claim."""
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    fullest: dict[tuple[str, str, str], dict] = {}
    for row in sorted(rows, key=lambda r: r["profile"] == "full"):
        fullest[(row["system"], row["claim"], row["budget"])] = row
    lines = [
        "# Claims, re-measured",
        "",
        "Generated from `benchmarks/results/claims.json` by `make claims`; the fullest measurement",
        "of each claim is shown. *assert* rows gate, *report* rows inform. A claim that fails is",
        "published as failed.",
        "",
    ]
    for system in sorted({key[0] for key in fullest}):
        mine = [row for key, row in fullest.items() if key[0] == system]
        first = mine[0]
        lines += [
            f"## {system}",
            "",
            f"Model `{first['model']}`; {first['data']}; `{first['command']}`; "
            f"{first['hardware']['processor']}, {first['hardware']['threads']} threads; "
            f"{first['date']}.",
            "",
            "| claim | budget | baseline | value | 95 % interval | seeds | profile | verdict |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in mine:
            interval = row["interval"]
            shown = f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else ""
            verdict = ("holds" if row["holds"] else "**fails**") + f" ({row['rule']})"
            note = f" ({row['note']})" if row["note"] else ""
            lines.append(
                f"| {row['claim']}{note} | {row['budget']} | {row['baseline']} "
                f"{row['baseline_value']:.4g} | {row['value']:.4g} {row['unit']} | {shown} | "
                f"{len(row['seeds'])} | {row['profile']} | {verdict} |"
            )
        lines.append("")
    text = "\n".join(lines)
    current = DOCS.read_text() if DOCS.exists() else ""
    if check:
        if current != text:
            print("docs/claims.md is stale: run python -m benchmarks.claims --docs")
            return 1
        return 0
    Path(DOCS).parent.mkdir(exist_ok=True)
    DOCS.write_text(text)
    return 0


if __name__ == "__main__":
    typer.run(main)
