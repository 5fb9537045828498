"""Whole commands on a small model on disk."""

import json
import math
import shlex

import pytest

import byte_models


@pytest.fixture(scope="module")
def compressed(tiny, small, tmp_path_factory):
    """What `compress --json` printed, and the directory it wrote."""
    import contextlib
    import io

    from rankine import cli

    output = tmp_path_factory.mktemp("made") / "out"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        arguments = ["--method", "svd", "--keep", "0.6", *small, "-o", str(output), "--json"]
        code = cli.run(["compress", str(tiny), *arguments])
    assert code == 0
    return json.loads(printed.getvalue()), output


def test_compress_writes_a_directory_and_one_json_object(compressed):
    data, output = compressed
    assert (data["schema"], data["verb"]) == (1, "compress")
    names = {file.name for file in output.iterdir()}
    assert {"config.json", "model.safetensors", "report.html", "report.json"} <= names
    assert data["report"]["budget"]["keep"] <= 0.6


def test_the_report_says_how_and_with_what(compressed, tiny):
    """The command as typed, the peak beside its prediction, an interval for every perplexity."""
    _, output = compressed
    report = json.loads((output / "report.json").read_text())
    words = shlex.split(report["command"])
    assert words[:3] == ["rankine", "compress", str(tiny)]
    assert words[-2:] == ["-o", str(output)]
    assert {"--method", "svd", "--keep", "0.6", "--tokens", "4x32"} <= set(words)
    assert report["hardware"]["peak"] is None or report["hardware"]["peak"] > 1 << 20
    for row in report["rows"]:
        low, high = row["perplexity_interval"]
        assert low < row["perplexity"] < high
    page = (output / "report.html").read_text()
    assert "rankine compress" in page
    assert "95 %" in page


def test_compress_prints_the_table(rankine, tiny, small, tmp_path):
    output = tmp_path / "out"
    ran = rankine("compress", tiny, "--method", "svd", "--keep", "0.8", *small, "-o", output)
    assert ran.code == 0, ran.err
    for part in ("svd", "int8", "dense", "perplexity", str(output / "report.html")):
        assert part in ran.out
    assert {p.name for p in tmp_path.iterdir()} == {"out"}


def test_plan(rankine, tiny, small):
    ran = rankine("plan", tiny, "--method", "svd", "--keep", "0.6", *small)
    assert ran.code == 0, ran.err
    assert "transformers" in ran.out
    data = rankine("plan", tiny, "--method", "svd", "--keep", "0.6", *small, "--json")
    assert json.loads(data.out)["verb"] == "plan"


def test_inspect(rankine, compressed, tiny):
    _, output = compressed
    data = json.loads(rankine("inspect", output, "--json").out)
    assert data["format_version"] == "1.0"
    assert {m["kind"] for m in data["modules"].values()} == {"low_rank"}
    for module in data["modules"].values():
        assert module["stored_bits"] > 0
    text = rankine("inspect", output).out
    assert "rank=" in text
    assert "LlamaForCausalLM" in text
    dense = json.loads(rankine("inspect", tiny, "--json").out)
    assert (dense["format_version"], dense["modules"]) == (None, {})
    assert dense["weight_bytes"] > data["weight_bytes"]


def test_the_model_that_comes_along_goes_through_every_verb(rankine, tmp_path):
    assert "LlamaForCausalLM" in rankine("inspect", "embedded").out
    ran = rankine("export", "embedded", "-o", tmp_path / "dense")
    assert ran.code == 0, ran.err
    assert (tmp_path / "dense" / "tokenizer.json").is_file()


def test_compare(rankine, tiny, small):
    ran = rankine("compare", tiny, "--methods", "svd,svd_llm", "--keep", "0.8", *small, "--json")
    assert ran.code == 0, ran.err
    methods = {row["method"] for row in json.loads(ran.out)["rows"]}
    assert {"svd", "svd_llm"} <= methods


def test_export_dense(rankine, compressed, tmp_path):
    import transformers

    ran = rankine("export", compressed[1], "--to", "dense", "-o", tmp_path / "dense")
    assert ran.code == 0, ran.err
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in config
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense") is not None


def test_report_of_several_runs(rankine, compressed, tmp_path):
    output = compressed[1]
    ran = rankine("report", output, output, "-o", tmp_path / "both")
    assert ran.code == 0, ran.err
    assert (tmp_path / "both" / "report.html").stat().st_size > 10_000
    assert rankine("report", output, output).code == 2


def test_report_of_a_file(rankine, compressed, tmp_path):
    (tmp_path / "report.json").write_bytes((compressed[1] / "report.json").read_bytes())
    assert rankine("report", tmp_path / "report.json").code == 0
    assert (tmp_path / "report.html").is_file()


def test_eval_against(rankine, compressed, tiny, text):
    options = ("--evaluation", text, "--eval-tokens", "500", "--threads", "1")
    ran = rankine("eval", compressed[1], "--against", tiny, *options, "--json")
    assert ran.code == 0, ran.err
    data = json.loads(ran.out)
    before, after = data["rows"]
    assert (before["kind"], after["kind"]) == ("dense", "result")
    assert after["bytes"] < before["bytes"]
    estimate, low, high = data["difference"]
    assert low <= estimate <= high
    assert estimate == pytest.approx(math.log(after["perplexity"] / before["perplexity"]))
    assert "nats per token" in rankine("eval", tiny, "--against", tiny, *options).out


def test_one_window_has_a_difference_and_no_interval(rankine, compressed, tiny, text):
    asked = ("--against", tiny, "--evaluation", text, "--eval-tokens", "50", "--threads", "1")

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    ran = rankine("eval", compressed[1], *asked, "--json")
    data = json.loads(ran.out, parse_constant=refuse)
    assert data["difference"][1:] == [None, None]
    assert data["rows"][0]["perplexity_interval"] is None
    assert "95 %" not in rankine("eval", compressed[1], *asked).out.splitlines()[-1]


def test_generate(rankine, compressed):
    arguments = ("generate", compressed[1], "--prompt", "def ", "--max-tokens", "5")
    ran = rankine(*arguments)
    assert ran.code == 0, ran.err
    assert ran.out.startswith("def ")
    data = json.loads(rankine(*arguments, "--json").out)
    assert data["tokens"] <= 5
    assert ran.out.rstrip("\n") == data["prompt"] + data["text"]
    drawn = [rankine(*arguments, "--temperature", "2", "--seed", s).out for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_generate_ends_with_the_context(rankine, tmp_path):
    """GPT-2 has no positions beyond it."""
    import transformers

    fields = {"vocab_size": 257, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 24}
    config = transformers.GPT2Config(**fields, bos_token_id=None, eos_token_id=None)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    byte_models.tokenizer().save_pretrained(tmp_path)
    ran = rankine("generate", tmp_path, "-p", "x" * 20, "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["tokens"] <= 12
    assert "at least one token" in rankine("generate", tmp_path, "-p", "").sentence
    (tmp_path / "text.txt").write_text("some text " * 20)
    measured = ("--evaluation", tmp_path / "text.txt", "--eval-tokens", "100", "--json")
    row = json.loads(rankine("eval", tmp_path, *measured).out)["rows"][0]
    assert row["tokens_per_second"] > 0


def test_methods(rankine):
    listing = rankine("methods").out
    assert "svd_llm" in listing
    assert "ridge" in rankine("methods", "auto").out
    entry = json.loads(rankine("methods", "auto", "--json").out)["method"]
    assert {"name", "knobs", "needs"} <= set(entry)
    assert 'did you mean "svd"' in rankine("methods", "sdv").sentence


# -- mistakes that only the run can see -----------------------------------------------------------
def mistaken(rankine, tmp_path, *arguments, code=2):
    """The sentence of a compress that must fail and leave nothing behind."""
    output = tmp_path / "made" / "out"
    ran = rankine("compress", *arguments, "--threads", "1", "-o", output)
    assert ran.code == code, (ran.out, ran.err)
    assert not output.parent.exists() or list(output.parent.iterdir()) == []
    return ran.sentence


SVD = ("--method", "svd_llm", "--keep", "0.6", "--tokens", "4x32", "--eval-tokens", "200")


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("empty.txt", b"", "empty.txt"),
        ("one.txt", b"x", "token"),
        ("binary.txt", bytes(range(256)) * 40, "binary.txt"),
        ("rows.jsonl", b'{"body": "' + b"some text " * 90 + b'"}\n', "body"),
        ("broken.jsonl", b'{"text": \n', "broken.jsonl"),
    ],
)
def test_calibration_files(rankine, tiny, text, tmp_path, name, content, part):
    file = tmp_path / name
    file.write_bytes(content)
    column = ["--text-column", "txt"] if name == "rows.jsonl" else []
    sentence = mistaken(
        rankine, tmp_path, tiny, *SVD, "--calibration", file, "--evaluation", text, *column
    )
    assert part in sentence


def test_a_directory_that_is_no_model(rankine, tmp_path, small):
    (tmp_path / "empty").mkdir()
    assert "config.json" in mistaken(rankine, tmp_path, tmp_path / "empty", *SVD, *small)
    assert "nowhere" in mistaken(rankine, tmp_path, tmp_path / "nowhere", *SVD, *small)


def test_an_output_that_exists(rankine, tiny, small, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("keep me")
    ran = rankine("compress", tiny, *SVD, *small, "-o", output)
    assert ran.code == 2
    assert "--force" in ran.sentence
    ran = rankine("compress", tiny, *SVD, *small, "-o", output, "--force")
    assert ran.code == 2, "something else than a model is not replaced"
    assert [p.name for p in output.iterdir()] == ["mine.txt"]


def test_a_budget_below_the_smallest_size(rankine, tiny, small, tmp_path):
    options = ("--method", "svd", "--keep", "0.001", *small)
    sentence = mistaken(rankine, tmp_path, tiny, *options, code=3)
    assert "keep 0.0" in sentence


def test_no_weight_matches(rankine, tiny, small, tmp_path):
    mistaken(rankine, tmp_path, tiny, *SVD, *small, "--include", "*.nothing")
