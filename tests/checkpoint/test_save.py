"""An output directory is whole or not there, and inherits what its input says about itself."""

import errno
import json
import os

import checkpoint_models as families
import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from rankine.checkpoint import load, save
from rankine.checkpoint.beside import _held
from rankine.checkpoint.card import front_matter
from rankine.errors import UserError
from rankine.patch import Patch
from rankine.structures import LowRank, Quantized

CARD = """---
license: mit
base_model: someone/original
language: en
---
# The input
"""


@pytest.fixture
def net():
    """A plain torch module with a tied pair of layers inside."""
    return make_net()


def make_net(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.Linear(24, 24))
    model[3].weight = model[2].weight
    model.register_buffer("step", torch.tensor(3))
    return model


def net_patch(model):
    return families.fitted_all(model, {"0": LowRank(4), "2": Quantized(4, group=8)})


# -- any module ---------------------------------------------------------------------------------
def test_a_plain_module_round_trips_into_one_built_anew(net, tmp_path):
    patch = net_patch(net)
    patch.apply(net)
    save(net, tmp_path / "out", patch)
    files = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert files == ["README.md", "SHA256SUMS", "model.safetensors", "patch.json"]
    other = make_net(seed=1)
    other.step.fill_(0)
    assert load(tmp_path / "out", into=other) is other
    x = torch.randn(5, 12)
    assert torch.equal(other(x), net(x))
    assert other.step == 3


def test_a_transformers_model_loads_into_a_module_too(saved):
    model = load(saved("llama").directory, into=families.llama())
    assert torch.equal(families.logits(model), saved("llama").logits)
    target, source = next(iter(saved("llama").patch.tied.items()))
    assert model.get_parameter(target) is model.get_parameter(source)


def test_the_wrong_module_is_refused_in_a_sentence(net, tmp_path):
    patch = net_patch(net)
    patch.apply(net)
    save(net, tmp_path / "out", patch)
    with pytest.raises(UserError, match="expected a module 0"):
        load(tmp_path / "out", into=nn.ModuleDict({"a": nn.Linear(12, 24)}))
    with pytest.raises(UserError, match="build it as it was before compression"):
        load(tmp_path / "out", into=nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24)))
    with pytest.raises(UserError, match=r"rankine\.load\(directory, into=module\)"):
        load(tmp_path / "out")


# -- beside, then renamed -----------------------------------------------------------------------
class Interrupted(nn.Module):
    """A module whose saving is interrupted when half of it is written."""

    def __init__(self, error):
        super().__init__()
        self.inner, self.error = nn.Linear(2, 2), error

    def state_dict(self, *args, **kwargs):
        raise self.error


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (RuntimeError("bug"), RuntimeError),
        (OSError(errno.ENOSPC, "No space left on device"), UserError),
        (SafetensorError("I/O error: No space left on device"), UserError),
    ],
)
@pytest.mark.parametrize("force", [False, True])
def test_nothing_half_written_stays(net, tmp_path, error, seen, force):
    out = tmp_path / "out"
    if force:
        save(net, out, Patch())
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with pytest.raises(seen):
        save(Interrupted(error), out, Patch(), force=force)
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_what_killed_processes_left_is_removed_by_the_next(net, tmp_path):
    """Gigabytes, perhaps; but not what another process writes, nor anything of the user's."""
    for name in (".out.writing-killed", ".out.writing-alive", ".out.notes", ".other.writing-x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    (tmp_path / f".out.writing-{os.getpid()}-new").mkdir()
    with _held(tmp_path / ".out.writing-alive") as free:
        assert free
        save(net, tmp_path / "out", Patch())
    left = {path.name for path in tmp_path.iterdir()} - {"out"}
    assert left == {
        ".out.writing-alive",
        f".out.writing-{os.getpid()}-new",
        ".out.notes",
        ".other.writing-x",
    }


def test_an_output_that_exists_is_refused(net, tmp_path):
    out = tmp_path / "out"
    save(net, out, Patch())
    with pytest.raises(UserError, match="expected a new output directory") as caught:
        save(net, out, Patch())
    assert "--force" in str(caught.value)


def test_force_replaces_a_model_wholly(net, tmp_path):
    out = tmp_path / "out"
    save(net, out, Patch(), extra_files={"report.html": "<p>old</p>"})
    save(net, out, Patch(), force=True, extra_files={"report.json": b"{}"})
    names = {p.name for p in out.iterdir()}
    assert names == {"README.md", "SHA256SUMS", "model.safetensors", "patch.json", "report.json"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_force_takes_an_empty_directory(net, tmp_path):
    (tmp_path / "out").mkdir()
    save(net, tmp_path / "out", Patch(), force=True)


@pytest.mark.parametrize("kind", ["other files", "file", "link"])
def test_force_never_replaces_what_is_no_model(net, tmp_path, kind):
    out = tmp_path / "out"
    if kind == "other files":
        out.mkdir()
        (out / "thesis.tex").write_text("years of work")
    elif kind == "file":
        out.write_text("years of work")
    else:
        out.symlink_to(save(net, tmp_path / "model", Patch()))
    with pytest.raises(UserError, match="expected a"):
        save(net, out, Patch(), force=True)
    assert os.path.lexists(out)


def test_parents_are_made_and_permissions_are_ordinary(net, tmp_path):
    out = save(net, tmp_path / "a" / "b" / "out", Patch())
    (tmp_path / "plain").mkdir()
    assert out.stat().st_mode == (tmp_path / "plain").stat().st_mode


# -- what the output says about itself ----------------------------------------------------------
@pytest.fixture
def licensed(tmp_path):
    """A dense input directory with a card, a licence and a notice."""
    model = families.llama()
    model.save_pretrained(tmp_path / "input")
    for name, text in {"README.md": CARD, "LICENSE": "MIT!", "NOTICE.txt": "thanks"}.items():
        (tmp_path / "input" / name).write_text(text)
    return tmp_path / "input"


def test_the_card_inherits_licence_base_and_notices(licensed, tmp_path):
    model = load(licensed)
    patch = families.fitted(model, "model.layers.0.mlp.up_proj", LowRank(4))
    out = save(patch.apply(model), tmp_path / "out", patch, cost="Perplexity 9.1 → 9.4.")
    card = front_matter(out)
    assert card["license"] == "mit"
    assert card["base_model"] == "someone/original"
    assert card["tags"] == ["rankine"]
    assert (out / "LICENSE").read_text() == "MIT!"
    assert (out / "NOTICE.txt").read_text() == "thanks"
    text = (out / "README.md").read_text()
    assert "Perplexity 9.1 → 9.4." in text
    assert 'rankine.load("out")' in text


def test_a_licence_file_without_a_card(licensed, tmp_path):
    (licensed / "README.md").unlink()
    out = save(families.llama(), tmp_path / "out", Patch(), source=licensed)
    assert front_matter(out)["license"] == "other"
    assert front_matter(out)["license_link"] == "LICENSE"


def test_no_licence_is_said(saved):
    assert "stated no licence" in (saved("llama").directory / "README.md").read_text()


def test_a_hub_id_becomes_the_base_model(tmp_path):
    out = save(families.llama(), tmp_path / "out", Patch(), source="someone/original")
    assert front_matter(out)["base_model"] == "someone/original"


def test_a_damaged_card_is_no_obstacle(licensed, tmp_path):
    (licensed / "README.md").write_bytes(b"---\n: : [\n---\n\xff")
    save(families.llama(), tmp_path / "out", Patch(), source=licensed)


def test_generation_config_comes_along(tmp_path):
    model = families.llama()
    model.generation_config.max_new_tokens = 7
    save(model, tmp_path / "out", Patch())
    assert (
        json.loads((tmp_path / "out" / "generation_config.json").read_text())["max_new_tokens"] == 7
    )
