"""Several processes on one run, as torchrun starts them: each is a rank of a `Group`.

All ranks run the same program on the same model and data. What decides how it goes on (what the
journal holds, what was allocated) is the first rank's word, by `first`; what is summed over data is
summed over the ranks, by `sum`; units of work are shared out by `mine` and their results read from
the journal behind a `barrier`. By itself a process is a `Group` of one, which costs nothing.

Small values travel through torch.distributed's store, tensors by gloo from and to main memory.
Every wait is for ranks by name, so that one that died, ended or gives no sign of life for `timeout`
seconds ends the others with a sentence that names it. How long a living rank computes is its own
affair.

torch is imported by who joins a group; nothing else in the house imports torch.distributed.
"""

from __future__ import annotations

import heapq
import importlib
import json
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rankine.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
#: Seconds without a sign of life after which a rank counts as lost.
TIMEOUT = 300.0
#: Seconds between two looks at those that are waited for.
LOOK = 0.5
#: Seconds for which a rank that ends leaves the word to another: torchrun stops all behind the
#: first that ends.
LINGER = 2.0
#: What any launcher sets for `env://`.
LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class RankError(UserError):
    """Another rank is gone. `again`: does the same command go on from here? The exit code is that
    of the rank that ended, where it told one."""

    def __init__(self, message: str, exit_code: int = 1, again: bool = True):
        super().__init__(message)
        self.exit_code, self.again = exit_code, again


class Group:
    """A process by itself."""

    rank = 0
    size = 1
    #: Is it for this rank to say why the run ends?
    speaks = True

    @property
    def leads(self) -> bool:
        """Is this the rank that measures, writes and speaks?"""
        return self.rank == 0

    @property
    def near(self) -> list[int]:
        """The ranks on this machine, this one among them."""
        return [self.rank]

    def leave(self, error: BaseException) -> BaseException:
        """Tell the others that this rank ends by an error. Returns what to raise: of a signal that
        only came because another rank was gone, that rank's end."""
        return error

    def share(self, items: Sequence[T]) -> list[T]:
        """This rank's part of data that all ranks know, in its order."""
        return list(items[self.rank :: self.size])

    def mine(self, items: Sequence[T], cost: Callable[[T], float]) -> list[T]:
        """This rank's part of units of work that all ranks know, in their order: the costliest
        first, each to the rank that has the least."""
        loads = [(0.0, rank) for rank in range(self.size)]
        taken = set()
        for n in sorted(range(len(items)), key=lambda n: -cost(items[n])):
            load, rank = heapq.heappop(loads)
            heapq.heappush(loads, (load + cost(items[n]), rank))
            if rank == self.rank:
                taken.add(n)
        return [item for n, item in enumerate(items) if n in taken]

    def first(self, make: Callable[[], T]) -> T:
        """What the first rank makes of it, on every rank (as JSON keeps it); the others wait."""
        return make()

    def all(self, value: T) -> list[T]:
        """Every rank's value (as JSON keeps it), by rank."""
        return [value]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.all(None)

    def sum(self, *tensors: Tensor | None) -> list[Any]:
        """Float64 sums over the ranks: the same bits on each, in the place of what was given. None
        counts as zeros, and so does what a smaller tensor lacks at its ends."""
        return list(tensors)

    def total(self, number: float) -> Any:
        """A number's sum over the ranks."""
        return sum(self.all(number))


def launched() -> bool:
    """Did torchrun, or another launcher like it, start this process as one of several?"""
    size = os.environ.get("WORLD_SIZE", "")
    return all(name in os.environ for name in LAUNCHED) and size.isdigit() and int(size) > 1


@contextmanager
def joined(timeout: float = TIMEOUT) -> Iterator[Group]:
    """The group of what a launcher started (a process by itself is a group of one). An error that
    leaves the context ends the other ranks.

    Raises RankError when not all come within `timeout` seconds.
    """
    if not launched():
        yield Group()
        return
    group = _Ranks.met(timeout)
    try:
        yield group
    except BaseException as error:
        group.leave(error)
        raise
    finally:
        group.close()


class _Ranks(Group):
    """`store`, `pulse`: two connections to one store, as a wait blocks its own."""

    def __init__(self, store: Any, pulse: Any, rank: int, size: int, timeout: float):
        dist = _distributed()
        self.rank, self.size, self.timeout = rank, size, timeout
        self._store, self._turn = store, 0
        self._left = False
        self._lost: set[int] = set()
        self._peers: list[tuple[str, int]] = []
        self._pause = min(timeout / 4, 5.0)
        self._closed = threading.Event()
        threading.Thread(target=self._beat, args=(pulse,), daemon=True).start()
        self._peers = [(str(host), int(pid)) for host, pid in self.all(_address())]
        within = dist.PrefixStore("gloo", store)
        self._gloo = dist.ProcessGroupGloo(within, rank, size, timedelta(seconds=timeout))

    @classmethod
    def met(cls, timeout: float) -> _Ranks:
        """Meet the others where the environment says."""
        dist = _distributed()
        size = int(os.environ["WORLD_SIZE"])
        try:
            stores = [
                next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))[0]
                for _ in range(2)
            ]
        except (RuntimeError, ValueError) as error:
            raise RankError(
                f"expected {size} ranks to meet at {os.environ['MASTER_ADDR']}:"
                f"{os.environ['MASTER_PORT']}, found: {str(error).splitlines()[0]}"
            ) from error
        prefixed = [dist.PrefixStore("rankine", store) for store in stores]
        return cls(prefixed[0], prefixed[1], int(os.environ["RANK"]), size, timeout)

    @property
    def near(self) -> list[int]:
        """See `Group.near`."""
        here = self._peers[self.rank][0]
        return [rank for rank, (host, _) in enumerate(self._peers) if host == here]

    @property
    def _others(self) -> list[int]:
        return [rank for rank in range(self.size) if rank != self.rank]

    # -- values ---------------------------------------------------------------------------------
    def first(self, make: Callable[[], T]) -> T:
        """See `Group.first`."""
        if self.leads:
            self._say("first", make())
        return self._heard("first", [0])[0]

    def all(self, value: T) -> list[T]:
        """See `Group.all`."""
        self._say("all", value)
        return self._heard("all", range(self.size))

    def _say(self, verb: str, value: Any) -> None:
        with self._connected():
            self._store.set(f"{self._turn}/{self.rank}", json.dumps([verb, value]))

    def _heard(self, verb: str, ranks: Collection[int]) -> list[Any]:
        """What the ranks say in this turn."""
        keys = {rank: f"{self._turn}/{rank}" for rank in ranks}
        start = looked = time.monotonic()
        look = _Look()
        while late := self._silent_in(keys):
            now = time.monotonic()
            if now - looked > LOOK:
                self._look_after(late, look, self.timeout)
                looked = now
            time.sleep(min(0.02 * (now - start), 0.1 * LOOK))
        with self._connected():
            said = [json.loads(self._store.get(key)) for key in keys.values()]
        self._turn += 1
        if any(other != verb for other, _ in said):
            raise RuntimeError(f"the ranks parted at {verb} {self._turn}: please report this")
        return [value for _, value in said]

    def _silent_in(self, keys: Mapping[int, str]) -> list[int]:
        """Asked for again and again: torch warns on stderr of every wait that is cut short."""
        with self._connected():
            if self._store.check(list(keys.values())):
                return []
            return [rank for rank, key in keys.items() if not self._store.check([key])]

    # -- tensors --------------------------------------------------------------------------------
    def sum(self, *tensors: Tensor | None) -> list[Any]:
        """See `Group.sum`."""
        forms = self.all([None if t is None else [t.device.type, *t.shape] for t in tensors])
        return [self._summed(t, [f for f in of if f]) for t, *of in zip(tensors, *forms)]

    def _summed(self, own: Tensor | None, forms: list[list[Any]]) -> Tensor | None:
        import torch

        if not forms:
            return None
        device, *shape = map(max, zip(*forms, strict=True))
        if own is None or list(own.shape) != shape:
            whole = torch.zeros(shape, dtype=torch.float64)
            if own is not None:
                whole[tuple(slice(0, n) for n in own.shape)] = own
        else:
            whole = own.double().cpu().contiguous()
        try:
            self._gloo.allreduce([whole]).wait()
        except RuntimeError as error:  # somebody went while it ran
            raise self._blamed(error) from error
        return whole.to(own.device if own is not None else device)

    # -- signs of life --------------------------------------------------------------------------
    def _beat(self, pulse: Any) -> None:
        beats = 0
        while not self._closed.is_set():
            try:
                pulse.set(f"beat/{self.rank}", str(beats))
            except RuntimeError:  # the store went, and with it the run
                return
            beats += 1
            self._closed.wait(self._pause)

    def _look_after(self, ranks: Collection[int], look: _Look, patience: float) -> None:
        """Raises RankError for the first of the ranks that ended, died or fell silent."""
        for rank in ranks:
            with self._connected():
                ended = self._store.check([f"ended/{rank}"])
                said = json.loads(self._store.get(f"ended/{rank}")) if ended else None
                known = self._store.check([f"beat/{rank}"])
                beat = self._store.get(f"beat/{rank}") if known else b""
            if said is not None:
                raise RankError(f"rank {rank} ended: {said['why']}", said["code"], said["again"])
            if self._dead(rank):
                self._lost.add(rank)
                raise self._gone(rank, "died")
            if look.silence(rank, beat) > patience:
                self._lost.add(rank)
                raise self._gone(rank, f"gave no sign of life for {patience:.0f} s")

    def _gone(self, rank: int, how: str) -> RankError:
        name = f"rank {rank}"
        if self._peers:
            host, pid = self._peers[rank]
            name += f" (process {pid} on {host})"
        return RankError(f"expected {self.size} ranks to finish together, found that {name} {how}")

    def _dead(self, rank: int) -> bool:
        """Known to be so: of processes on other machines only their silence tells."""
        if not self._peers:
            return False
        host, pid = self._peers[rank]
        return host == socket.gethostname() and not runs(pid)

    def _blamed(self, error: RuntimeError) -> RankError:
        """Who broke a connection: looked for until everybody else has given two signs of life."""
        look, end = _Look(), time.monotonic() + 3 * self._pause
        try:
            while time.monotonic() < end:
                self._look_after(self._others, look, 2.5 * self._pause)
                time.sleep(LOOK)
        except RankError as found:
            return found
        return RankError(
            f"expected {self.size} ranks to stay connected, found: {str(error).splitlines()[0]}"
        )

    @contextmanager
    def _connected(self) -> Iterator[None]:
        dist = _distributed()
        try:
            yield
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            self._lost.add(0)
            how = "died" if self._dead(0) else "is no longer connected"
            raise self._gone(0, how) from error

    # -- the end --------------------------------------------------------------------------------
    def leave(self, error: BaseException) -> BaseException:
        """See `Group.leave`."""
        if self._left:
            return error
        self._left = True
        code = int(getattr(error, "exit_code", 1))
        if code > 128 and (found := self._first_gone()) and found.exit_code != code:
            error, code = found, found.exit_code
        told = isinstance(error, UserError) or code > 128
        why = str(error) if told else f"{type(error).__name__}: {error}"
        again = getattr(error, "again", not isinstance(error, UserError))
        with suppress(RuntimeError):  # nobody is left to be told
            self._store.set(
                f"ended/{self.rank}", json.dumps({"why": why, "code": code, "again": again})
            )
            self.speaks = all(self._mute(rank) for rank in range(self.rank))
        return error

    def _first_gone(self) -> RankError | None:
        try:
            self._look_after(self._others, _Look(), math.inf)
        except RankError as found:
            return found
        return None

    def _mute(self, rank: int) -> bool:
        """Is it gone without a word?"""
        if rank in self._lost:
            return True
        return self._dead(rank) and not self._store.check([f"ended/{rank}"])

    def close(self) -> None:
        """No more signs of life. The first rank, which may keep the store, goes when the others
        need it no more; one that ends by an error and does not speak leaves time to who does."""
        self._closed.set()
        with suppress(RuntimeError):
            self._store.set(f"closed/{self.rank}", "")
            end = time.monotonic() + LINGER
            while self.leads and time.monotonic() < end:
                left = [r for r in self._others if not self._store.check([f"closed/{r}"])]
                if all(map(self._dead, left)):
                    break
                time.sleep(0.01)
        if self._left and not self.speaks:
            time.sleep(LINGER)


class _Look:
    """How long those that are waited for have been silent, as seen from here."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[bytes, float]] = {}

    def silence(self, rank: int, beat: bytes) -> float:
        """Seconds since the rank's pulse changed, or since it was first looked at."""
        now = time.monotonic()
        if rank not in self._seen or self._seen[rank][0] != beat:
            self._seen[rank] = (beat, now)
        return now - self._seen[rank][1]


def _distributed() -> Any:
    """torch.distributed, whose stubs lack what we call."""
    return importlib.import_module("torch.distributed")


def _address() -> tuple[str, int]:
    return socket.gethostname(), os.getpid()


def runs(pid: int) -> bool:
    """Is there such a process on this machine, and not only what its parent has not looked at?"""
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return False
    except OSError:  # another user's, or no /proc
        return True
    return state not in "ZX"
