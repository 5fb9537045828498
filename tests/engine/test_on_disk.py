"""A model larger than the memory it may use: the same result, byte for byte, from the disk."""

import pytest
import torch
from safetensors.torch import load_file

import tiny_models as tiny
from rankine import UserError, compress, load
from rankine.engine.memory import available, fits

METHODS = {
    "svd": {},
    "svd_llm": {},
    "lord": {"sweep": (0.8, 0.5)},
    "auto": {},
    "anchored_svd": {},
    "basis_sharing": {},
    "basis_sharing updated": {"update": True},
    "afm": {},
    "auto refined": {"refine": True, "epochs": 2},
}


def result(directory, output, memory, method="svd_llm", **fields):
    name = method.split()[0]
    knobs = METHODS.get(method, {})
    return compress(
        str(directory),
        output=output,
        method=name,
        set=knobs,
        keep=0.6,
        memory=memory,
        task=tiny.tokens(count=8),
        **fields,
    )


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def directory(request, tmp_path_factory):
    place = tmp_path_factory.mktemp("model") / request.param
    tiny.LANGUAGE[request.param]().to(torch.bfloat16).save_pretrained(place)
    return place


def tensors(directory):
    found = {}
    for file in directory.glob("*.safetensors"):
        found.update(load_file(file))
    return found


@pytest.mark.parametrize("method", METHODS)
def test_from_the_disk_it_is_the_same_bytes(directory, tmp_path, method):
    here = result(directory, tmp_path / "here", "1TB", method, evaluate=False)
    there = result(directory, tmp_path / "there", "1kB", method, evaluate=False)
    expected, found = tensors(tmp_path / "here"), tensors(tmp_path / "there")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    assert there.report["budget"]["keep"] == here.report["budget"]["keep"]
    assert there.report["targets"] == here.report["targets"]
    batch = {"input_ids": tiny.ids()}
    with torch.no_grad():
        a, b = load(tmp_path / "here")(**batch).logits, load(tmp_path / "there")(**batch).logits
    assert torch.equal(a, b)


def test_the_result_is_measured_block_by_block(directory, tmp_path):
    here = result(directory, tmp_path / "here", "1TB")
    there = result(directory, tmp_path / "there", "1kB")
    assert [row["name"] for row in there.report["rows"]] == [
        row["name"] for row in here.report["rows"]
    ]
    for one, other in zip(here.report["rows"], there.report["rows"], strict=True):
        assert one["bytes"] == pytest.approx(other["bytes"], rel=0.01)
        assert one["keep"] == other["keep"]
    assert any("from the disk" in warning for warning in there.report["warnings"])
    assert all(parameter.is_meta for parameter in there.model.parameters())


def test_it_wants_an_output(directory):
    with pytest.raises(UserError, match="does not fit into memory"):
        result(directory, None, "1kB")


def test_what_fits(directory):
    assert available() > 1 << 20
    assert fits(directory, None)
    assert fits(directory, "1GB")
    assert not fits(directory, "1kB")


@pytest.mark.parametrize("method", ["svd", "afm"])
def test_a_shared_table_from_the_disk(tmp_path, method):
    """The embedding stands outside the blocks, and its output layer with it."""
    tiny.llama().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    include = ["model.embed_tokens", "*.q_proj"]
    for name, memory in (("here", "1TB"), ("there", "1kB")):
        result(tmp_path / "model", tmp_path / name, memory, method, include=include, evaluate=False)
    expected, found = tensors(tmp_path / "here"), tensors(tmp_path / "there")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert "lm_head.up.weight" not in found
    model = load(tmp_path / "there")
    assert model.model.embed_tokens.down.weight is model.lm_head.up.weight


def test_a_mixture_of_experts_that_does_not_fit_is_one_sentence(tmp_path):
    """Its files hold experts one by one, so its blocks cannot be streamed."""
    tiny.mixtral().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"experts one by one.*--memory \d") as caught:
        result(tmp_path / "model", tmp_path / "out", "1kB")
    assert {p.name for p in tmp_path.iterdir()} == {"model"}
    said = str(caught.value).partition("--memory ")[2].split()[0]
    assert result(tmp_path / "model", tmp_path / "out", said, evaluate=False).output is not None


# -- the work directory -----
@pytest.fixture(scope="module")
def broad(tmp_path_factory):
    """Broad enough that moments outweigh the journal's own words."""
    place = tmp_path_factory.mktemp("model") / "broad"
    config = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4}
    tiny.llama(**config).to(torch.bfloat16).save_pretrained(place)
    return place


def bytes_below(directory):
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


@pytest.mark.parametrize("memory", ["1TB", "1kB"], ids=["resident", "streamed"])
@pytest.mark.parametrize(
    "method", ["svd_llm", "lord", "auto", "kfac_svd", "auto refined", "basis_sharing"]
)
def test_scratch_is_what_the_plan_said_and_empties(broad, tmp_path, method, memory):
    seen, work = [0], tmp_path / "work"

    def look(stage, done, total):
        seen.append(bytes_below(work) if work.exists() else 0)

    wanted = {"work": str(work), "progress": look, "evaluate": False}
    done = result(broad, tmp_path / "out", memory, method, **wanted)
    said = done.report["plan"]["scratch"]
    words = 1500 * 28 * 4  # an entry's own: four per target
    assert max(seen) <= 1.1 * said + words
    assert max(seen) >= 0.8 * said
    if done.stages[-1].spool is not None:  # nothing measured is left behind
        left = work.rglob("entries/survey-0*/*.safetensors")
        assert sum(file.stat().st_size for file in left) < 100 * 28


@pytest.mark.parametrize("memory", ["1TB", "1kB"])
def test_an_input_that_is_all_factors_has_no_plain_baselines(tmp_path, memory):
    """Of whose weights none is left to quantize; where some are, they are what is counted."""
    tiny.llama().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    result(tmp_path / "model", tmp_path / "factors", "1TB", "svd", evaluate=False)
    rows = result_of_codes(tmp_path / "factors", tmp_path / "codes", memory)
    assert [row["kind"] for row in rows] == ["dense", "result"]
    some = {"include": ["*.q_proj"], "evaluate": False}
    result(tmp_path / "model", tmp_path / "some", "1TB", "svd", **some)
    rows = result_of_codes(tmp_path / "some", tmp_path / "some-codes", memory)
    assert [row["kind"] for row in rows] == ["dense", "baseline", "baseline", "result"]
    assert all(0 < row["keep"] < 1 for row in rows[1:3])


def result_of_codes(directory, output, memory):
    made = compress(
        str(directory), output=output, method="rtn", memory=memory, task=tiny.tokens(count=8)
    )
    return made.report["rows"]
