"""lm-eval on a model, from local task files, offline.

Rolling perplexities of lm-eval are per word or byte of a document: not the windowed perplexity of
`evaluation.perplexity`.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from rankine.errors import UserError
from rankine.limits import YAML_BYTES, parse_yaml, read_text

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
FIELDS = ("question", "choices", "answer")
NAME = re.compile(r"\w[\w.-]*")


def evaluate_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: str | Path | Sequence[str | Path],
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    limit: int | None = None,
    offline: bool = True,
) -> dict[str, dict[str, float]]:
    """{task: {metric: value}} of lm-eval for a causal language model and local tasks.

    `tasks`: lm-eval YAML files, directories of them, or multiple-choice files (.jsonl) with the
    fields question, choices (a list) and answer (the index of the right one). `limit`: examples
    per task. lm-eval runs the templates in a YAML task as code: read a stranger's before. Raises
    UserError for files that are none of these, and without lm-eval.
    """
    _require_lm_eval()
    files = [tasks] if isinstance(tasks, (str, Path)) else list(tasks)
    with _offline(offline), tempfile.TemporaryDirectory(prefix="rankine-tasks-") as work:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        names = [name for file in files for name in _collect(Path(file), Path(work))]
        lm = HFLM(
            pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length
        )
        found = simple_evaluate(
            model=lm,
            tasks=names,
            task_manager=TaskManager(include_path=work, include_defaults=False),
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
        )
    return {name: _figures(found["results"][name]) for name in names}


def _figures(result: dict[str, Any]) -> dict[str, float]:
    """ "acc,none" → acc; errors of the mean and labels are left out."""
    return {
        metric.removesuffix(",none"): float(value)
        for metric, value in result.items()
        if isinstance(value, (int, float)) and "stderr" not in metric and metric != "sample_len"
    }


def _require_lm_eval() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise UserError(
            "tasks are scored by lm-eval, which is not installed: pip install 'rankine[eval]'"
        ) from None


@contextmanager
def _offline(wanted: bool) -> Iterator[None]:
    """No hub is asked inside. The libraries read the environment once, at import: so they are
    imported before, and their own switches are set and restored with it."""
    import datasets
    import huggingface_hub
    import lm_eval  # noqa: F401

    switches = (
        (huggingface_hub.constants, "HF_HUB_OFFLINE"),
        (datasets.config, "HF_HUB_OFFLINE"),
        (datasets.config, "HF_DATASETS_OFFLINE"),
    )
    environment = {name: os.environ.get(name) for name in OFFLINE}
    values = [getattr(module, name) for module, name in switches]
    if wanted:
        os.environ.update(OFFLINE)
        for module, name in switches:
            setattr(module, name, True)
    try:
        yield
    finally:
        for (module, name), value in zip(switches, values):
            setattr(module, name, value)
        for name, text in environment.items():
            if text is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = text


# -- task files ------------------------------------------------------------------------------------
def _collect(path: Path, work: Path) -> list[str]:
    """Put a file's tasks where lm-eval looks; their names."""
    if path.is_dir():
        inside = sorted(p for p in path.iterdir() if p.suffix in (".yaml", ".yml", ".jsonl"))
        if not inside:
            raise UserError(f"expected .yaml or .jsonl task files in {path}, found none")
        return [name for file in inside for name in _collect(file, work)]
    if not path.is_file():
        raise UserError(f"expected a task file or a directory of them at {path}, found nothing")
    if path.suffix == ".jsonl":
        return [_multiple_choice(path, work)]
    if path.suffix in (".yaml", ".yml"):
        return [_yaml(path, work)]
    raise UserError(f'expected a .yaml or .jsonl task file, found "{path.name}"')


def _multiple_choice(path: Path, work: Path) -> str:
    """Check a {question, choices, answer} file and write the task that reads it."""
    rows = 0
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            _check_row(line, f"line {number} of {path}")
            rows += 1
    if not rows:
        raise UserError(f"expected questions in {path}, found none")
    return _write(
        work,
        {
            "task": path.stem,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(path.resolve())}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "metric_list": [
                {"metric": m, "aggregation": "mean", "higher_is_better": True}
                for m in ("acc", "acc_norm")
            ],
        },
    )


def _check_row(line: str, where: str) -> None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"expected JSON in {where}: {error}") from None
    if not isinstance(row, dict) or any(field not in row for field in FIELDS):
        found = ", ".join(sorted(row)) if isinstance(row, dict) else type(row).__name__
        raise UserError(f"expected the fields {', '.join(FIELDS)} in {where}, found: {found}")
    choices, answer = row["choices"], row["answer"]
    if not isinstance(choices, list) or not isinstance(answer, int):
        raise UserError(f"expected a list of choices and the index of the answer in {where}")
    if not 0 <= answer < len(choices):
        raise UserError(f"expected an answer below {len(choices)} in {where}, found {answer}")


def _yaml(path: Path, work: Path) -> str:
    """A task of the user's, its data files made absolute: lm-eval takes them from where it runs."""
    task = parse_yaml(read_text(path, YAML_BYTES), path)  # no tags: !function would run code
    if not isinstance(task, dict) or not isinstance(task.get("task"), str):
        raise UserError(f'expected an lm-eval task with a "task" name in {path}, found none')
    if not NAME.fullmatch(task["task"]):  # it names the file that lm-eval reads
        raise UserError(
            f"expected a task's name of letters, digits, _, - and ., found {task['task']!r:.60} in "
            f"{path}"
        )
    if "include" in task:
        raise UserError(
            f"expected a whole task in {path}, found one that includes {task['include']!r:.60}: "
            "write its fields out"
        )
    if files := (task.get("dataset_kwargs") or {}).get("data_files"):
        task["dataset_kwargs"]["data_files"] = _absolute(files, path.parent)
    return _write(work, task)


def _absolute(files: Any, root: Path) -> Any:
    if isinstance(files, dict):
        return {split: _absolute(value, root) for split, value in files.items()}
    if isinstance(files, list):
        return [_absolute(value, root) for value in files]
    return str((root / files).resolve()) if (root / files).exists() else files


def _write(work: Path, task: dict[str, Any]) -> str:
    import yaml

    target = work / f"{task['task']}.yaml"
    if target.exists():
        raise UserError(f'expected tasks of different names, found "{task["task"]}" twice')
    target.write_text(yaml.safe_dump(task), encoding="utf-8")
    return str(task["task"])
