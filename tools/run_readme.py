"""Run the commands that README.md shows, in the order it shows them.

Every `bash` and `python` block is run unless `<!-- not run: reason -->` stands before it; behind
`<!-- file: name.py -->` it is written to that file instead. `make` runs in the repository, with
`--quick` for the demo; everything else in one scratch directory.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(
    r"(<!-- not run: [^>]*-->\n)?(?:<!-- file: (\S+) -->\n)?```(bash|python)\n(.*?)```", re.DOTALL
)


def commands(text: str) -> Iterator[list[str]]:
    """What to run: shell lines one by one, a Python block as a whole."""
    for skipped, file, language, body in BLOCK.findall(text):
        if skipped:
            continue
        if file:
            yield [sys.executable, "-c", f"open({file!r}, 'w').write({body!r})"]
            continue
        if language == "python":
            yield [sys.executable, "-c", body]
            continue
        for line in body.replace("\\\n", " ").splitlines():
            if line.strip():
                yield ["bash", "-c", line]


def main() -> int:
    """0 when all of them succeed."""
    found = list(commands((ROOT / "README.md").read_text("utf-8")))
    if not found:
        print("expected commands in README.md, found none", file=sys.stderr)
        return 1
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "ARGS": "--quick"}
    with tempfile.TemporaryDirectory(prefix="rankine-readme-") as scratch:
        for command in found:
            shown = command[-1].strip().splitlines()
            print(f"$ {shown[0]}{' ...' if len(shown) > 1 else ''}", flush=True)
            place = ROOT if shown[0].startswith("make ") else scratch
            start = time.monotonic()
            done = subprocess.run(command, cwd=place, env=environment, check=False)
            print(f"  ({time.monotonic() - start:.0f} s)", flush=True)
            if done.returncode:
                print(f"exit code {done.returncode}: {command[-1]}", file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
