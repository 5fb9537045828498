"""SIGKILL at any file that is written; the same command again gives the same bytes.

Each victim is a forked process that kills itself at a file event (open for writing, rename) in a
part of its work: what the next run finds is what a power cut leaves.
"""

import os
import signal
import sys
import traceback

import pytest
import torch

import tiny_models as tiny
from rankine import compress, heal
from rankine.training import loop

#: Part of the work → what the paths of its files contain.
PARTS = {
    "head": "journal.json",
    "survey": "/survey-0",
    "solve": "/solve-0",
    "refine": "/refine-0",
    "train": "/train",
    "save": "/.out.",
}
#: Where victims die: the part, and how many of its file events they live to see.
COMPRESS = [("head", 0), ("survey", 3), ("refine", 3), ("solve", 0), ("solve", 9), ("solve", 20)]
COMPRESS += [("save", 0), ("save", 1), ("save", 3), ("save", 5)]
HEAL = [("train", 1), ("train", 6), ("save", 2)]


def compressed(model, output):
    fields = {"method": "auto", "set": {"refine": True, "epochs": 2}, "keep": 0.6}
    compress(str(model), output=output, task=tiny.tokens(count=4), evaluate=False, **fields)


def smaller(model, output):
    compress(str(model), output=output, method="svd", keep=0.5, evaluate=False)


def healed(model, output):
    task = tiny.tokens(count=8)
    task._sources["train"] = list(task.batches("calibration"))
    heal(
        str(model.parent / "smaller"),
        teacher=str(model),
        output=output,
        steps=24,
        batch=2,
        evaluate=False,
        task=task,
    )


def killed(work, part, lives):
    """Run `work()` in a child that dies at file event number `lives` of a part; was it killed?"""
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    left = lives

    def listen(event, args):
        nonlocal left
        if event not in ("open", "os.rename") or (event == "open" and not _writes(*args)):
            return
        if PARTS[part] in str(args[0]):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    try:  # never back into pytest
        sys.addaudithook(listen)
        work()
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def _writes(path, mode, flags):
    return bool(set(mode or "") & set("wax+")) or bool(flags & (os.O_WRONLY | os.O_RDWR))


def contents(output):
    """Bytes of everything but the report (it tells times) and the card that quotes it."""
    return {
        path.name: path.read_bytes()
        for path in sorted(output.iterdir())
        if not path.name.startswith("report")
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    place = tmp_path_factory.mktemp("kills") / "model"
    tiny.llama().to(torch.bfloat16).save_pretrained(place)
    smaller(place, place.parent / "smaller")
    return place


@pytest.fixture(autouse=True)
def keeps_every_step(monkeypatch):
    monkeypatch.setitem(loop.train.__kwdefaults__, "every", 0.0)  # seconds between two entries


@pytest.fixture(scope="module")
def undisturbed(model):
    found = {}
    for job in (compressed, healed):
        output = model.parent / job.__name__ / "out"
        job(model, output)
        found[job] = contents(output)
    return found


@pytest.mark.parametrize(
    ("job", "part", "lives"),
    [(compressed, *kill) for kill in COMPRESS] + [(healed, *kill) for kill in HEAL],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_the_same_bytes_after_a_kill(model, undisturbed, tmp_path, job, part, lives):
    output = tmp_path / "out"
    assert killed(lambda: job(model, output), part, lives)
    if part != "save" or lives < 5:
        assert not output.exists()
    job(model, output)
    found = contents(output)
    assert found.keys() == undisturbed[job].keys()
    for name, data in undisturbed[job].items():
        assert found[name] == data, name
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
