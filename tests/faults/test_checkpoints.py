"""A stranger's checkpoint: nothing outside it is read, nothing it claims is believed before it is
measured, none of its code runs, and every lie is one sentence."""

from __future__ import annotations

import json
import os
import shutil
import struct
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import rankine as library
import tiny_models
from rankine.checkpoint.fits import check_counts
from rankine.patch import Patch

FACTORS = "model.layers.0.self_attn.q_proj"
INDEX = "model.safetensors.index.json"
ESCAPE = "\x1b[2J\x1b[31mred"


def read_header(file: Path) -> tuple[dict, bytes]:
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_header(file: Path, header: dict | bytes, rest: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + rest)


def change(file: Path, **fields) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def plan(directory: Path, **fields) -> None:
    """Change the patch in config.json."""
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] |= fields
    (directory / "config.json").write_text(json.dumps(config))


def structure(directory: Path, **fields) -> None:
    """Change one structure of the patch."""
    config = json.loads((directory / "config.json").read_text())
    modules = config["quantization_config"]["modules"]
    plan(directory, modules={**modules, FACTORS: {**modules[FACTORS], **fields}})


def another(directory: Path, path: str, **fields) -> None:
    """Put another structure at `path`."""
    config = json.loads((directory / "config.json").read_text())
    plan(directory, modules={**config["quantization_config"]["modules"], path: fields})


def entry(directory: Path, **fields) -> None:
    """Change the header of one tensor."""
    header, rest = read_header(directory / "model.safetensors")
    header[f"{FACTORS}.down.weight"] |= fields
    write_header(directory / "model.safetensors", header, rest)


def indexed(directory: Path, name) -> None:
    """Every tensor is said to be in the file `name`; the real one moves out of the directory."""
    header, _ = read_header(directory / "model.safetensors")
    shutil.move(directory / "model.safetensors", directory.parent / "outside.safetensors")
    names = [key for key in header if key != "__metadata__"]
    (directory / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, name)}))


def linked(directory: Path) -> None:
    shutil.move(directory / "model.safetensors", directory.parent / "outside.safetensors")
    (directory / "model.safetensors").symlink_to(directory.parent / "outside.safetensors")


def nested(depth: int) -> dict:
    found = {"kind": "low_rank", "rank": 1}
    for _ in range(depth):
        found = {"kind": "sum", "terms": {"a": found, "b": {"kind": "low_rank", "rank": 1}}}
    return found


def write(directory: Path, name: str, text: str) -> None:
    (directory / name).write_text(text)


def other_dtype(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors[f"{FACTORS}.down.weight"] = tensors[f"{FACTORS}.down.weight"].int()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def wrong_pivots(directory: Path) -> None:
    """A pivoted layer whose rows are far outside the weight."""
    tensors = load_file(directory / "model.safetensors")
    rank, rest = len(tensors[f"{FACTORS}.down.weight"]), tensors[f"{FACTORS}.up.weight"]
    tensors[f"{FACTORS}.up.weight"] = rest[rank:].contiguous()
    tensors[f"{FACTORS}.pivots"] = 1_000_000 * torch.arange(rank, dtype=torch.int32)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    structure(directory, pivoted=True)


def truncate(file: Path, length: int) -> None:
    file.write_bytes(file.read_bytes()[:length])


def pipe(directory: Path) -> None:
    (directory / "config.json").unlink()
    os.mkfifo(directory / "config.json")


CODE = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
TERMS = {f"t{n}": {"kind": "low_rank", "rank": 1} for n in range(20_000)}

#: What was done → a part of the sentence about it.
SPOILED = {
    # an index
    "index up": (lambda d: indexed(d, "../outside.safetensors"), "../outside.safetensors"),
    "index absolute": (lambda d: indexed(d, str(d.parent / "outside.safetensors")), "beside"),
    "index no name": (lambda d: indexed(d, 5), "found 5"),
    "index no map": (lambda d: (indexed(d, "x"), write(d, INDEX, '{"weight_map": ["x"]}')), "map"),
    "index other kind": (lambda d: indexed(d, "config.json"), "config.json"),
    "index nul": (lambda d: indexed(d, "a\0b.safetensors"), "printable"),
    "index escape": (lambda d: indexed(d, f"{ESCAPE}.safetensors"), "printable"),
    "index missing": (lambda d: indexed(d, "gone.safetensors"), "gone.safetensors"),
    "index deep": (lambda d: (indexed(d, "x"), write(d, INDEX, "[" * 10**5)), "nesting"),
    "link": (linked, "a link to another place"),
    "licence link": (lambda d: (d / "LICENSE").symlink_to("/etc/passwd"), "LICENSE"),
    # headers
    "cut": (lambda d: truncate(d / "model.safetensors", 9000), "complete"),
    "empty": (lambda d: truncate(d / "model.safetensors", 0), "complete"),
    "header length": (lambda d: (d / "model.safetensors").write_bytes(b"\xff" * 9), "complete"),
    "header shape": (lambda d: entry(d, shape=[10**9, 10**9]), "complete"),
    "header offset": (lambda d: entry(d, data_offsets=[0, 10**15]), "complete"),
    "header negative": (lambda d: entry(d, shape=[-1, 4]), "complete"),
    "header other shape": (lambda d: entry(d, shape=[32, 4]), "of the sizes that its config.json"),
    "header dtype": (other_dtype, "I32"),
    "header deep": (
        lambda d: write_header(d / "model.safetensors", b'{"a":' * 10**5, b""),
        "complete",
    ),
    "header escape": (
        lambda d: save_file({ESCAPE: torch.zeros(1)}, d / "model.safetensors"),
        "printable names",
    ),
    "no numbers": (
        lambda d: save_file(dict.fromkeys("ab", torch.zeros(0)), d / "model.safetensors"),
        "expected the tensor",
    ),
    "directory for a file": (
        lambda d: ((d / "model.safetensors").unlink(), (d / "model.safetensors").mkdir()),
        "complete",
    ),
    # the config
    "config huge": (lambda d: write(d, "config.json", " " * (17 << 20) + "{}"), "bytes"),
    "config deep": (lambda d: write(d, "config.json", '{"a":' * 10**5), "nesting"),
    "config pipe": (pipe, "found no config.json"),
    "config escape": (lambda d: change(d / "config.json", model_type=ESCAPE), "printable"),
    "layers": (lambda d: change(d / "config.json", num_hidden_layers=10**9), "num_hidden_layers"),
    "many layers": (lambda d: change(d / "config.json", num_hidden_layers=9_000), "more than"),
    "labels": (lambda d: change(d / "config.json", num_labels=10**9), "num_labels"),
    "width": (lambda d: change(d / "config.json", hidden_size=10**12), "of the sizes"),
    "width NaN": (lambda d: change(d / "config.json", hidden_size=float("nan")), "nan"),
    "width negative": (lambda d: change(d / "config.json", hidden_size=-4), "negative"),
    "width text": (lambda d: change(d / "config.json", hidden_size="32"), "hidden_size"),
    "vocabulary": (lambda d: change(d / "config.json", vocab_size=10**11), "of the sizes"),
    "heads": (lambda d: change(d / "config.json", num_attention_heads=0), "ZeroDivisionError"),
    "no type": (lambda d: change(d / "config.json", model_type=5), "model type"),
    "no patch": (lambda d: change(d / "config.json", quantization_config="x"), "an object as"),
    "other patch": (
        lambda d: change(d / "config.json", quantization_config={"quant_method": "gptq"}),
        "gptq",
    ),
    # the patch
    "rank": (lambda d: structure(d, rank=10**9), "rank of at most"),
    "rank NaN": (lambda d: structure(d, rank=float("nan")), "nan"),
    "rank infinite": (lambda d: structure(d, rank=float("inf")), "inf"),
    "rank float": (lambda d: structure(d, rank=4.0), "rank"),
    "rank text": (lambda d: structure(d, rank="4"), "rank"),
    "rank negative": (lambda d: structure(d, rank=-3), "rank"),
    "kind unknown": (lambda d: structure(d, kind="evil"), "unknown structure"),
    "kind list": (lambda d: structure(d, kind=["low_rank"]), "kind"),
    "kind escape": (lambda d: structure(d, kind=ESCAPE), "printable"),
    "act": (lambda d: structure(d, act=["relu"]), "act"),
    "field unknown": (lambda d: structure(d, evil=1), "evil"),
    "dense size": (lambda d: another(d, FACTORS, kind="dense", shape=[2**31, 1]), "2,147,483,647"),
    "dense room": (lambda d: another(d, FACTORS, kind="dense", shape=[10**8] * 2), "asks for"),
    "dense shape": (lambda d: another(d, FACTORS, kind="dense", shape=[-1, "x"]), "shape"),
    "dense one": (lambda d: another(d, FACTORS, kind="dense", shape=[3]), "shape"),
    "bits": (lambda d: another(d, FACTORS, kind="quantized", code_bits=[4]), "code_bits"),
    "group": (lambda d: another(d, FACTORS, kind="quantized", code_bits=4, group="x"), "group"),
    "group size": (
        lambda d: another(d, FACTORS, kind="quantized", code_bits=4, group=10**30),
        "group",
    ),
    "sum deep": (lambda d: another(d, FACTORS, **nested(300)), "nesting"),
    "sum of few": (lambda d: another(d, FACTORS, **nested(20)), "expected"),
    "sum wide": (lambda d: another(d, FACTORS, kind="sum", terms=TERMS), "two to 16"),
    "sum names": (
        lambda d: another(d, FACTORS, kind="sum", terms={**nested(1)["terms"], "forward": {}}),
        "kind",
    ),
    "sum method": (
        lambda d: another(d, FACTORS, kind="sum", terms={"forward": nested(0), "b": nested(0)}),
        "forward",
    ),
    "modules list": (lambda d: plan(d, modules=[1]), "modules"),
    "modules many": (
        lambda d: plan(d, modules={f"no.{n}": nested(0) for n in range(50_000)}),
        "50,000",
    ),
    "the model": (lambda d: another(d, "model", **nested(0)), "LlamaModel"),
    "a norm": (lambda d: another(d, "model.norm", **nested(0)), "LlamaRMSNorm"),
    "tied to a class": (lambda d: plan(d, tied={"model.__class__": "lm_head.weight"}), "__class__"),
    "tied list": (lambda d: plan(d, tied=[1]), "tied"),
    "tied number": (lambda d: plan(d, tied={"lm_head.weight": 5}), "tied"),
    "config list": (lambda d: plan(d, config=[1]), "config"),
    "adapter": (lambda d: plan(d, adapter=[[5]]), "adapter"),
    "version": (lambda d: plan(d, format_version="1" * 6000 + ".0"), "format version"),
    "version number": (lambda d: plan(d, format_version=1.0), "format version"),
    "pivots": (wrong_pivots, "pivots"),
    # beside them
    "code": (lambda d: change(d / "config.json", model_type="x", auto_map=CODE), "custom code"),
    "tokenizer": (lambda d: write(d, "tokenizer.json", "{"), "tokenizer"),
    "tokenizer deep": (lambda d: write(d, "tokenizer.json", "[" * 10**5), "tokenizer"),
    "hashes": (lambda d: write(d, "SHA256SUMS", f"{'0' * 64}  model.safetensors"), "other bytes"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_a_lie_is_one_sentence(what, directory, refused):
    """`generate` loads the model; `plan` would only read what it says of itself."""
    spoil, part = SPOILED[what]
    (directory / "evil.py").write_text("open('ran', 'w')\nclass Config: ...\nclass Model: ...\n")
    spoil(directory)
    assert part in refused("generate", directory, "-p", "x", "--max-tokens", "1")
    assert not Path("ran").exists()


@pytest.mark.parametrize("what", ["index up", "link", "rank", "layers", "sum wide", "dense room"])
@pytest.mark.parametrize("verb", ["plan", "compress"])
def test_before_any_work(what, verb, directory, small, refused, tmp_path):
    spoil, part = SPOILED[what]
    spoil(directory)
    out = ["-o", tmp_path / "out"] if verb == "compress" else []
    assert part in refused(verb, directory, "--method", "svd", "--keep", "0.5", *small, *out)
    assert {file.name for file in tmp_path.iterdir()} <= {"model", "outside.safetensors"}


@pytest.mark.parametrize(
    "what", ["index up", "link", "modules list", "no patch", "kind unknown", "no numbers"]
)
def test_inspect_bears_it(what, directory, rankine):
    SPOILED[what][0](directory)
    ran = rankine("inspect", directory)
    assert ran.code in (0, 2)
    assert ran.code == 0 or ran.sentence


def test_code_in_a_directory_never_runs(directory, rankine, tmp_path, monkeypatch):
    """Even where transformers knows the architecture and only a file offers its own."""
    monkeypatch.chdir(tmp_path)
    (directory / "evil.py").write_text("open('ran', 'w')\nclass Config: ...\nclass Model: ...\n")
    change(directory / "config.json", auto_map=CODE)
    change(directory / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Model", None]})
    assert rankine("generate", directory, "-p", "x", "--max-tokens", "1").code == 0
    assert not (tmp_path / "ran").exists()


def test_code_that_a_directory_names_is_not_handed_on(directory, small, rankine, tmp_path):
    """The output's card tells who cannot import rankine to trust it."""
    change(directory / "config.json", auto_map=CODE)
    change(directory / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Model", None]})
    out = tmp_path / "out"
    again = ["--method", "rtn", "--evaluate", "no", *small, "-o", out]
    assert rankine("compress", directory, *again).code == 0
    said = [file.name for file in out.iterdir() if b"evil" in file.read_bytes()]
    assert said == []


def test_tables_that_are_not_saved_are_measured_too(tmp_path):
    """GPT-J computes its positions: as many as its config says."""
    fields = {**SMALL, "n_embd": 32, "n_layer": 1, "n_head": 2, "rotary_dim": 8, "n_positions": 32}
    config = transformers.GPTJConfig(**fields)
    transformers.GPTJForCausalLM(config).save_pretrained(tmp_path / "model")
    assert library.load(tmp_path / "model") is not None
    change(tmp_path / "model" / "config.json", n_positions=10**13)
    with pytest.raises(library.UserError, match=r"tables \(positions, masks\) take at most"):
        library.load(tmp_path / "model")


def test_an_architecture_is_a_model_of_transformers(directory, rankine):
    """A name of something else is passed over. What is no name is too, or transformers says so:
    its older releases check the types of a config's fields."""
    for name, codes in (("pipeline", [0]), ("PreTrainedTokenizerFast", [0]), (5, [0, 2])):
        change(directory / "config.json", architectures=[name])
        assert rankine("generate", directory, "-p", "x", "--max-tokens", "1").code in codes


SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
HONEST = {
    "Mixtral": {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2, "num_local_experts": 4},
    "T5": {"vocab_size": 64, "d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8},
    "Albert": {**SMALL, "intermediate_size": 48, "embedding_size": 16},
    "Mamba": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
}


@pytest.mark.parametrize("family", HONEST)
def test_honest_checkpoints_are_believed(family, tmp_path):
    """Banks that files hold expert by expert, tables tied three times, layers that share weights,
    an infinity in a config."""
    config = getattr(transformers, f"{family}Config")(**HONEST[family])
    auto = {"T5": "AutoModelForSeq2SeqLM", "Albert": "AutoModelForMaskedLM"}.get(family)
    model = getattr(transformers, auto or "AutoModelForCausalLM").from_config(config)
    model.save_pretrained(tmp_path / "model")
    again = library.load(tmp_path / "model").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


def test_what_is_large_and_no_count():
    """Gemma 3n has a vocabulary per layer; a context may have ten million positions."""
    honest = {"vocab_size_per_layer_input": 262_144, "max_position_embeddings": 10_485_760}
    check_counts({**honest, "text_config": {"num_hidden_layers": 126}}, Path("config.json"))
    for name in ("n_layer", "encoder_layers", "num_local_experts", "num_labels"):
        with pytest.raises(library.UserError, match=name):
            check_counts({"text_config": {name: 10**6}}, Path("config.json"))


def test_the_hub_cache_is_made_of_links(compressed, tmp_path, rankine):
    """models--a--b/snapshots/<revision>/x → ../../blobs/<hash>: those are known."""
    blobs, snapshot = tmp_path / "m" / "blobs", tmp_path / "m" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(compressed.iterdir()):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert rankine("inspect", snapshot).code == 0
    (snapshot / "LICENSE").symlink_to("../../../../secret")
    assert "LICENSE" in rankine("inspect", snapshot).sentence


def test_a_flipped_bit_is_found(compressed, tmp_path, refused):
    copy = shutil.copytree(compressed, tmp_path / "copy")
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-7] ^= 0x10
    (copy / "model.safetensors").write_bytes(data)
    assert "found other bytes" in refused("generate", copy, "-p", "x")


def test_a_plain_module_is_as_careful(compressed, tmp_path):
    """`load(into=)` reads patch.json; the module is the user's, the sizes are not."""
    net = torch.nn.Sequential(torch.nn.Linear(8, 8))
    library.save(net, tmp_path / "net")
    body = json.loads((tmp_path / "net" / "patch.json").read_text())
    for modules, part in (
        ({"0": {"kind": "low_rank", "rank": 10**9}}, "rank"),
        ({"0": {"kind": "dense", "shape": [10**9, 10**9]}}, "place for 0.bias"),
        ({"7": {"kind": "low_rank", "rank": 1}}, "a module 7"),
    ):
        (tmp_path / "net" / "patch.json").write_text(json.dumps({**body, "modules": modules}))
        with pytest.raises(library.UserError, match=part):
            library.load(tmp_path / "net", into=torch.nn.Sequential(torch.nn.Linear(8, 8)))


@pytest.mark.parametrize("text", ["[", "[" * 10**5, "5", "{}", '{"schema": "9" }', "\0", "é"])
def test_a_report_of_nonsense(text, tmp_path, refused):
    (tmp_path / "report.json").write_text(text, "latin-1")
    refused("report", tmp_path)


sizes = st.integers(1, 12) | st.sampled_from([-1, 0, 40, 2**31, 10**9, 10**30]) | st.floats()
values = st.none() | st.booleans() | sizes | st.text(max_size=3) | st.lists(sizes, max_size=3)
FIELDS = {
    "low_rank": ("rank", ("view", "act", "pivoted", "bias")),
    "dense": ("shape", ("view",)),
    "quantized": ("code_bits", ("group", "axis")),
}
structures = st.one_of(
    st.dictionaries(st.sampled_from(["kind", "rank", "terms", ""]), values),
    *(
        st.fixed_dictionaries(
            {"kind": st.just(kind), first: sizes | values}, optional=dict.fromkeys(others, values)
        )
        for kind, (first, others) in FIELDS.items()
    ),
)
sums = st.fixed_dictionaries(
    {"kind": st.just("sum"), "terms": st.dictionaries(st.sampled_from("ab.c"), structures)}
)
patches = st.fixed_dictionaries(
    {"modules": st.dictionaries(st.sampled_from(["first", "second", "x"]), structures | sums)},
    optional={
        "tied": st.just({}) | values,
        "config": st.just({}) | values,
        "adapter": st.just([]) | values,
    },
)


@seed(0)
@settings(
    max_examples=200,
    deadline=None,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
@given(patches)
def test_patches_of_nonsense(data):
    """Whatever JSON a patch may be, it is a patch or one sentence; on meta no size takes room."""
    with torch.device("meta"):
        net = tiny_models.Mlp()
    with suppress(library.UserError):
        Patch.from_json(json.loads(json.dumps(data))).swap(net)
