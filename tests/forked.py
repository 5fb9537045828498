"""Ranks as forked processes: what torchrun starts, without its seconds. As there, the store they
meet at is the parent's, and outlives each of them."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

#: Seconds after which ranks that hang are killed, and the test with them.
PATIENCE = 240.0


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def on_ranks(size: int, place: Path, work: Callable[[int], Any]) -> list[Any]:
    """What `work(rank)` returns in each of `size` forked processes that know of each other as
    torchrun would tell them; of one that did not return, how it ended, as an `Ended`."""
    children = []
    place.mkdir(exist_ok=True)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for rank in range(size):
        file = place / f"rank-{rank}"
        file.unlink(missing_ok=True)
        child = os.fork()
        if not child:
            _be(rank, size, store.port, file, work)
        children.append(child)
    codes = _wait(children)
    return [_outcome(place / f"rank-{rank}", code) for rank, code in enumerate(codes)]


@dataclass(frozen=True)
class Ended:
    """An exit code, or minus the number of the signal; and what was printed on the way."""

    code: int
    text: str


def _be(rank: int, size: int, port: int, file: Path, work: Callable[[int], Any]) -> None:
    code = 1
    try:  # never back into pytest
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(size), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        sys.stdout = sys.stderr = file.with_suffix(".out").open("w", buffering=1)
        result = work(rank)
        file.write_bytes(pickle.dumps(result))
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)


def _wait(children: list[int]) -> list[int]:
    end, codes = time.monotonic() + PATIENCE, dict.fromkeys(children, 0)
    left = set(children)
    while left:
        for child in list(left):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[child] = os.waitstatus_to_exitcode(status)
                left.remove(child)
        if time.monotonic() > end:
            for child in left:
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            end += PATIENCE
        time.sleep(0.01)
    return list(codes.values())


def _outcome(file: Path, code: int) -> Any:
    if code == 0 and file.exists():
        return pickle.loads(file.read_bytes())
    return Ended(code, file.with_suffix(".out").read_text())
