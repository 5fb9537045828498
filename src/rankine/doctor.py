"""What a bug report needs to know, and whether this installation works: versions, device, threads,
memory, disk, extras, and a self-test that compresses, saves and loads a real model.

Nothing heavy is imported before it is asked for, so that a broken torch is a finding, no crash.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from rankine import __version__
from rankine.threads import cores

#: Options of the self-test: the first block of the embedded model at half its size.
TEST: dict[str, Any] = {
    "method": "svd_llm",
    "keep": 0.5,
    "tokens": "2x64",
    "include": ("*.layers.0.*",),
}
#: Extras that users install; the rest is for development.
EXTRAS = ("eval", "onnx", "gguf", "testing")


def examine() -> dict[str, Any]:
    """Every section as JSON-clean data; `problems` is empty where all is well."""
    found: dict[str, Any] = {
        "rankine": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages(),
        "extras": extras(),
        "threads": threads(),
        "disk": disk(),
    }
    problems = [f"{name}: {p['problem']}" for name, p in found["packages"].items() if p["problem"]]
    for section, look in {"memory": memory, "device": device, "self_test": self_test}.items():
        found[section], problem = attempt(look)
        problems += [f"{section.replace('_', '-')}: {problem}"] if problem else []
    return {**found, "problems": problems}


def attempt(look: Callable[[], dict[str, Any] | None]) -> tuple[dict[str, Any], str]:
    """(what was found, "") or ({}, the error): a doctor reports what is broken."""
    try:
        return look() or {}, ""
    except Exception as error:
        return {}, f"{type(error).__name__}: {error}"


def requirements() -> list[Requirement]:
    """What the installed package says it needs; nothing where only its source is on the path."""
    try:
        return [Requirement(text) for text in metadata.requires("rankine") or ()]
    except metadata.PackageNotFoundError:
        return []


def packages() -> dict[str, dict[str, Any]]:
    """Name → version that is here, what is needed, and the problem where that does not fit."""
    needed = [r for r in requirements() if r.marker is None or r.marker.evaluate({"extra": ""})]
    return {r.name: _installed(r) for r in needed}


def extras() -> dict[str, dict[str, Any]]:
    """Extra → is all of it here, what is missing, and how to install it."""
    found = {}
    for extra in EXTRAS:
        asked = [r for r in requirements() if r.marker and r.marker.evaluate({"extra": extra})]
        missing = [r.name for r in asked if _installed(r)["problem"]]
        how = f'pip install "rankine[{extra}]"'
        found[extra] = {"present": not missing, "missing": missing, "install": how}
    return found


def _installed(needed: Requirement) -> dict[str, Any]:
    asked = str(needed.specifier)
    try:
        version = metadata.version(needed.name)
    except metadata.PackageNotFoundError:
        return {"version": None, "needs": asked, "problem": f"expected {asked}, found none"}
    fits = needed.specifier.contains(version, prereleases=True)
    problem = "" if fits else f"expected {asked}, found {version}"
    return {"version": version, "needs": asked, "problem": problem}


def threads() -> dict[str, Any]:
    """Cores this process may use, and what the user set."""
    names = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY")
    return {"cores": cores(), **{name: os.environ.get(name) for name in names}}


def disk() -> dict[str, dict[str, Any]]:
    """Free bytes where results, work and downloads go."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    places = {"here": Path.cwd(), "temporary": Path(tempfile.gettempdir()), "downloads": home}
    return {name: {"path": str(p), "free": free(p)} for name, p in places.items()}


def free(place: Path) -> int:
    """Bytes on the file system of a path that may not be there yet."""
    return shutil.disk_usage(next(p for p in (place, *place.parents) if p.exists())).free


def memory() -> dict[str, Any]:
    """Bytes: the machine's, the container's limit (None: none), and what a run may still take."""
    from rankine.engine.memory import CGROUPS, available

    limits = [_number(Path(limit)) for limit, _ in CGROUPS]
    names = getattr(os, "sysconf_names", {})
    pages = os.sysconf("SC_PHYS_PAGES") if "SC_PHYS_PAGES" in names else None
    total = pages * os.sysconf("SC_PAGE_SIZE") if pages else None
    limit = min((n for n in limits if n is not None and n < (total or n + 1)), default=None)
    return {"total": total, "limit": limit, "available": available()}


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no such file, or "max"
        return None


def device() -> dict[str, Any]:
    """What torch can compute on, and the compiled kernels."""
    import torch

    from rankine.engine.run import choose_device
    from rankine.kernels.fused import missing

    gpus = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
    return {
        "auto": str(choose_device("auto")),
        "cuda": [{"name": gpu.name, "memory": gpu.total_memory} for gpu in gpus],
        "torch_threads": torch.get_num_threads(),
        "kernels": missing() or "compiled",
    }


def self_test() -> dict[str, Any]:
    """Compress, save, load; the loaded model must compute what the compressed one does, from
    fewer bytes. Raises AssertionError (and whatever a broken installation raises)."""
    import torch

    import rankine
    from rankine.checkpoint.contents import inspect

    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="rankine-doctor-") as scratch, torch.no_grad():
        place = Path(scratch) / "compressed"
        made = rankine.compress("embedded", output=place, evaluate=False, device="cpu", **TEST)
        ids_bt = torch.arange(8, 40).reshape(2, 16)
        expected, found = (m(ids_bt).logits for m in (made.model, rankine.load(place)))
        stored = inspect(place)["weight_bytes"]
    dense = made.report["model"]["bytes"]
    if not (bool(torch.isfinite(found).all()) and torch.equal(expected, found)):
        raise AssertionError("the loaded model differs from the one that was saved")
    if stored >= dense:
        raise AssertionError(f"expected fewer than {dense} bytes, found {stored}")
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "bytes_before": dense, "bytes_after": stored}


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """For a terminal."""
    from rankine.budget import format_bytes

    def size(count: int | None) -> str:
        return "unknown" if count is None else format_bytes(count)

    yield f"rankine    {found['rankine']}, Python {found['python']} ({sys.executable})"
    yield f"platform   {found['platform']}"
    shown = (f"{name} {p['version'] or 'missing'}" for name, p in found["packages"].items())
    yield f"packages   {', '.join(shown)}"
    for extra, state in found["extras"].items():
        how = "present" if state["present"] else f"missing {', '.join(state['missing'])}"
        yield f"extra      {extra}: {how}{'' if state['present'] else '; ' + state['install']}"
    if computer := found["device"]:
        gpus = [f"{gpu['name']}, {size(gpu['memory'])}" for gpu in computer["cuda"]]
        yield f"device     {computer['auto']}; CUDA: {'; '.join(gpus) or 'none'}"
        yield f"kernels    {computer['kernels']}"
    used = found["device"].get("torch_threads", "unknown")
    yield f"threads    {used} of {found['threads']['cores']} cores"
    if ram := found["memory"]:
        limit = "none" if ram["limit"] is None else size(ram["limit"])
        yield (
            f"memory     {size(ram['available'])} available of {size(ram['total'])}, "
            f"limit of the container: {limit}"
        )
    for name, place in found["disk"].items():
        yield f"disk       {size(place['free'])} free {name} ({place['path']})"
    if test := found["self_test"]:
        shrunk = f"{size(test['bytes_before'])} to {size(test['bytes_after'])}"
        yield f"self-test  passed: {shrunk}, {test['seconds']:.1f} s"
