"""One run: the model, its data, its journal, and what has been decided so far."""

from __future__ import annotations

import copy
import hashlib
import os
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rankine.anatomy import Anatomy, describe
from rankine.budget import format_bytes
from rankine.checkpoint import (
    Journal,
    ModelInfo,
    directory_bytes,
    is_own,
    open_given,
    open_model,
    open_streamed,
    skeleton,
)
from rankine.checkpoint.form import CONFIG
from rankine.checkpoint.load import check_directory, directory_of
from rankine.checkpoint.streamed import Resident, Streamed, Weights
from rankine.discovery import get
from rankine.engine.given import FEW_LOGITS, LOGITS, task_of
from rankine.engine.memory import fits, footprint
from rankine.errors import AcceptanceError, BudgetError, UserError
from rankine.method import Learning
from rankine.patch import Patch
from rankine.progress import Progress, counted, quiet
from rankine.ranks import Group
from rankine.recipe import Recipe
from rankine.statistics import Walk
from rankine.tasks import FunctionTask, Task

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass
class Run:
    """`model` holds the stored weights and becomes the result; `work` is its copy in the dtype of
    computation, on which statistics are measured and patches are tried."""

    recipe: Recipe
    model: nn.Module
    work: nn.Module
    anatomy: Anatomy
    task: Task
    tokenizer: Any
    info: ModelInfo
    journal: Journal
    progress: Progress = quiet
    patch: Patch = field(default_factory=Patch)
    times: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    #: Number of weights that the first stage targets: what `keep` refers to in a chain.
    targeted: int = 0
    #: Was the model given by name? Then it can be opened again.
    named: bool = True
    #: Where the working copy's weights lie. Where that is the disk, `model` is the copy itself.
    weights: Weights = field(default_factory=Resident)
    #: What a plain module's written directory is loaded into to be checked.
    skeleton: nn.Module | None = None
    #: The processes that work on it together; each has a run of its own.
    group: Group = field(default_factory=Group)

    def forget(self) -> None:
        """Drop the journal once the output stands: a finished run has nothing to resume."""
        if self.group.leads:
            self.journal.remove()

    def reopen_dense(self) -> nn.Module | None:
        """The input again, in float32 on the CPU, to be timed beside the result; None for a
        module that was handed over (it is compressed in place)."""
        if not self.named:
            return None
        device = next(self.model.parameters()).device
        dense, _, _ = open_model(self.info.spec, device, "auto")
        return cast(dense, torch.float32) if device.type == "cpu" else dense

    @cached_property
    def store_dtype(self) -> torch.dtype:
        """dtype of the saved weights; asked for before any of a streamed model stands in memory, in
        the dtype of computation."""
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    @property
    def streamed(self) -> bool:
        """Do the weights stay on the disk?"""
        return isinstance(self.weights, Streamed)

    @property
    def dtype(self) -> torch.dtype:
        """dtype of computation."""
        if isinstance(self.weights, Streamed):
            return self.weights.dtype
        return next(p.dtype for p in self.work.parameters() if p.is_floating_point())

    def walk(self, whole: bool = False) -> Walk:
        """The calibration batches before the first block of the working copy: this rank's part of
        them, or all."""
        group = Group() if whole else self.group
        return Walk(self.work, self.anatomy, self.task, self.calibration, self.weights, group)

    @cached_property
    def calibration(self) -> list[Any]:
        """The calibration batches."""
        return list(self.task.batches("calibration"))


@contextmanager
def open_run(
    recipe: Recipe,
    model: str | nn.Module | None = None,
    task: Task | None = None,
    tokenizer: Any = None,
    progress: Progress = quiet,
    output: Path | None = None,
    group: Group | None = None,
) -> Iterator[Run]:
    """Open model, data and journal; the journal of a run without `--work` lies beside the output
    (so that a killed run resumes) or in a temporary directory, and goes when the run succeeds.
    Every rank of a `group` opens the same."""
    group = group or Group()
    device = choose_device(recipe.device)
    take_turns(device, group)
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    model = model or recipe.model
    weights: Weights = Resident()
    if (opened := opened_on_disk(recipe, model, group)) is not None:
        loaded, found, info, weights = opened
    else:
        loaded, found, info = open_given(model, recipe.into, device, recipe.dtype)
        if recipe.dtype != "auto":
            cast(loaded, DTYPES[recipe.dtype])
    streamed = isinstance(weights, Streamed)
    tokenizer = tokenizer if tokenizer is not None else found
    task = task or task_of(recipe, loaded, tokenizer, FEW_LOGITS if streamed else LOGITS)
    seed_everything(recipe.seed)
    with tempfile.TemporaryDirectory(prefix="rankine-") as scratch:
        shared = group.first(lambda: scratch)
        place = work_directory(recipe, output) or Path(shared) / "work"
        depends = fingerprint(recipe, loaded, task, weights) | {"ranks": str(group.size)}
        with open_journal(group, place, depends, recipe.fresh) as journal:
            run = Run(
                recipe,
                loaded,
                loaded if streamed else computing_copy(loaded),
                describe(loaded),
                task,
                tokenizer,
                info,
                journal,
                progress,
                info.patch,
                named=isinstance(model, str) and recipe.into is None and not is_own(model),
                weights=weights,
                skeleton=skeleton(loaded),
                group=group,
            )
            try:
                yield run
            except (AcceptanceError, BudgetError):  # asked for otherwise it is another run
                run.forget()
                raise
            except UserError:
                if not journal.has_entries():
                    run.forget()
                raise


def computing_copy(model: nn.Module) -> nn.Module:
    """A frozen copy in float32 on the CPU (moments of 16-bit activations would be rounded, and
    16-bit matrix products are slow on many CPUs); in the stored dtype elsewhere."""
    work = copy.deepcopy(model).eval().requires_grad_(False)
    device = next(work.parameters()).device
    return cast(work, torch.float32) if device.type == "cpu" else work


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Everything that is saved in `dtype`, in place. Derived buffers (rotary tables) stay as they
    are: a loaded model computes them in float32, and `Module.to` would round them."""
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return model


def open_journal(group: Group, place: Path, depends: dict[str, str], fresh: bool) -> Journal:
    """One lock for all ranks, held by the first, whose word it is whether the work may go on.

    Raises UserError, on every rank, where they are not about to do the same work.
    """
    first, *others = group.all(depends)
    for rank, found in enumerate(others, start=1):
        if differing := [key for key in depends if found[key] != first[key]]:
            raise UserError(
                f"expected the same work on every rank, found other {' and '.join(differing)} on "
                f"rank {rank} than on rank 0: give all of them the same"
            )
    journal = Journal.open(place, depends, fresh) if group.leads else None
    group.barrier()
    return journal or Journal.beside(place, depends)


def take_turns(device: torch.device, group: Group) -> None:
    """Ranks on one machine take its GPUs in turn."""
    if device.type == "cuda" and len(group.near) > 1:
        torch.cuda.set_device(group.near.index(group.rank) % torch.cuda.device_count())


def choose_device(name: str) -> torch.device:
    """auto: cuda when there is one. Raises UserError on a device that is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise UserError(f"expected device auto, cpu or cuda, found {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("expected a CUDA device, found none: use --device cpu")
    return torch.device(name)


def work_directory(recipe: Recipe, output: Path | None) -> Path | None:
    """Where the journal lies: `work`, else beside the output, else nowhere lasting."""
    if recipe.work:
        return Path(recipe.work).expanduser()
    return output.with_name(output.name + ".rankine-work") if output is not None else None


def seed_everything(seed: int) -> None:
    """For samplers that draw from torch's global generator; units of work use their own."""
    torch.manual_seed(seed)


def generator(seed: int, stage: str, unit: str) -> torch.Generator:
    """A unit's own generator: the same draws in any order, after any kill, on any rank."""
    digest = hashlib.sha256(f"{seed}/{stage}/{unit}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % 2**63)


def opened_on_disk(
    recipe: Recipe, model: str | nn.Module, group: Group
) -> tuple[nn.Module, Any, ModelInfo, Weights] | None:
    """A directory whose model does not fit into memory, opened without its weights; None for
    everything else. Raises UserError where its files do not hold the model's tensors as they are.
    """
    if not isinstance(model, str) or recipe.into is not None or is_own(model):
        return None
    if any(isinstance(get(stage.method, stage.set), Learning) for stage in recipe.chain()):
        return None  # an optimizer wants all weights at once
    directory = directory_of(model)
    if not (directory / CONFIG).is_file():
        return None
    if group.first(lambda: fits(directory, recipe.memory, len(group.near))):
        return None
    check_directory(directory)
    if (opened := open_streamed(directory, recipe.dtype)) is None:
        stored, _ = directory_bytes(directory)
        size = format_bytes(footprint(stored) * 21 // 20)  # shown rounded, so upwards
        raise UserError(
            f"expected a model that fits into memory, or can be worked on block by block, found "
            f"{model}, whose files hold other tensors than the model (experts one by one, say): "
            f"take a machine with about {size} of memory, or say --memory {size.replace(' ', '')} "
            "to try it here"
        )
    loaded, tokenizer, info, weights = opened
    return loaded, tokenizer, replace(info, spec=model), weights


def fingerprint(
    recipe: Recipe, model: nn.Module, task: Task, weights: Weights | None = None
) -> dict[str, str]:
    """What the journal's entries depend on."""
    import transformers

    from rankine import __version__

    return {
        "model": model_fingerprint(model, weights),
        "data": task.fingerprint("calibration"),
        **({"functions": task.code} if isinstance(task, FunctionTask) else {}),
        "recipe": str(sorted(recipe.decides().items())),
        "versions": f"rankine {__version__}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, python {platform.python_version()}",
        "machine": f"{processor()}, {choose_device(recipe.device)}",
        "threads": str(torch.get_num_threads()),
    }


def model_fingerprint(model: nn.Module, weights: Weights | None = None) -> str:
    """sha256 over names, shapes, dtypes and the bytes of every tensor, wherever it lies."""
    digest = hashlib.sha256()
    for name, tensor in counted(sorted(model.state_dict().items()), "read"):
        if isinstance(weights, Streamed):
            tensor = weights.read(name)
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def threads_available() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """Its model, where the system says: others round otherwise."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
