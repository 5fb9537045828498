"""docs/format.md is the format; its versions keep their promise."""

import dataclasses
import json
import subprocess
import sys
import warnings
from pathlib import Path

import checkpoint_models as families
import numpy as np
import pytest
import torch
from format_reader import Reader
from torch import nn

from rankine import structures
from rankine.checkpoint import form, load, save
from rankine.errors import UserError
from rankine.metric import Metric
from rankine.patch import Patch, dense_patch
from rankine.structures import LowRank, Quantized, Sum

DOCUMENT = (Path(__file__).parents[2] / "docs" / "format.md").read_text()


def assert_same_dense(directory, model, patch):
    """The document's reader finds the weights (and biases) that the model in memory stands for."""
    reader = Reader(directory)
    assert set(reader.modules) == set(patch.modules)
    merged = dense_patch(model)
    for path in merged.modules:
        want = merged.tensors[path + ".weight"]
        assert np.allclose(reader.weight(path), want, rtol=1e-5, atol=1e-6), path
        bias, found = merged.tensors.get(path + ".bias"), reader.bias(path)
        assert (bias is None) == (found is None), path
        assert bias is None or np.array_equal(found, bias), path
    return len(merged.modules)


@pytest.mark.parametrize("name", families.PATCHED)
def test_a_reader_from_the_document_rebuilds_every_weight(saved, name):
    one = saved(name)
    assert assert_same_dense(one.directory, one.model, one.patch) > 0


def test_shards_plain_modules_structures_in_structures_and_every_field(saved, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(24, 40, bias=n % 2 == 0) for n in range(6)])
    places = {
        "0": LowRank(5, pivoted=True),
        "1": LowRank(5),
        "2": Quantized(3, group=7, axis=-2),
        "3": Sum(
            a=Quantized(2, group=16),
            b=LowRank(2, pivoted=True),
            c=Sum(d=LowRank(1), e=Quantized(8, 50)),
        ),
        "4": LowRank(24, bias=True),
    }
    patch = families.fitted_all(model, places)
    for child in ("1.down", "3.c.d.up"):
        factor = patch.tensors[f"{child}.weight"]
        inner = Quantized(8, group=4)
        patch |= Patch.of(child, inner, inner.encode(factor, Metric()))
    patch.apply(model)
    save(model, tmp_path / "out", patch)
    assert_same_dense(tmp_path / "out", model, patch)
    other = nn.Sequential(*[nn.Linear(24, 40, bias=n % 2 == 0) for n in range(6)])
    load(tmp_path / "out", into=other)
    x = torch.randn(3, 24)
    assert [n for n, (a, b) in enumerate(zip(model, other)) if not torch.equal(a(x), b(x))] == []


def test_every_kind_and_field_stands_in_the_document():
    for kind, structure in structures.base._KINDS.items():
        if structure.__module__.startswith("rankine."):
            assert f"### `{kind}`" in DOCUMENT
            for field in (f.name for f in dataclasses.fields(structure)):
                assert f"| `{field}` |" in DOCUMENT, (kind, field)
    assert f"version {form.FORMAT_VERSION}" in DOCUMENT.splitlines()[0]
    for name in (form.CONFIG, form.PATCH, form.WEIGHTS, form.INDEX, form.MODELING, form.SUMS):
        assert f"`{name}`" in DOCUMENT


@pytest.mark.process
def test_the_reader_imports_nothing_of_ours():
    check = "import sys, format_reader; assert not {'rankine', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], cwd=Path(__file__).parent, check=True)


# -- versions -----------------------------------------------------------------------------------
@pytest.fixture
def versioned(saved, tmp_path):
    """The directory of a checkpoint that states another version, and a field of the future."""

    def make(version):
        one = saved("factors")
        out = save(one.model, tmp_path / "out", one.patch)
        config = json.loads((out / "config.json").read_text())
        config["quantization_config"] |= {"format_version": version, "of_the_future": 1}
        (out / "config.json").write_text(json.dumps(config))
        return out

    return make


def test_a_newer_minor_version_loads_with_a_warning(saved, versioned):
    with pytest.warns(UserWarning, match=r"format 1\.7, newer than the 1\.0"):
        model = load(versioned("1.7"))
    assert torch.equal(families.logits(model), saved("factors").logits)


@pytest.mark.parametrize("version", ["2.0", "10.1"])
def test_a_newer_major_version_is_refused_in_one_sentence(versioned, version):
    directory = versioned(version)
    for into in (None, families.llama()):
        with pytest.raises(UserError, match="upgrade rankine to read it") as caught:
            load(directory, into=into)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("version", ["0.9", "1.0"])
def test_older_versions_load_quietly(version):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        form.check_version(version)


@pytest.mark.parametrize("version", ["", "one", "1", None, "1.0.0"])
def test_no_version_is_no_version(version):
    with pytest.raises(UserError, match="expected a format version"):
        form.check_version(version)


@pytest.mark.parametrize("spoil", [{"kind": "of_the_future"}, {"kind": "low_rank", "wide": 1}])
def test_unknown_structures_are_refused(versioned, spoil):
    out = versioned("1.0")
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["modules"]["model.layers.0.mlp.up_proj"] = spoil
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"of_the_future|wide"):
        load(out)
