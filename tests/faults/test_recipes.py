"""Recipes of nonsense: whatever the YAML says, a plan or one sentence comes of it."""

from __future__ import annotations

import json
import os

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import tiny_models as tiny
from rankine import UserError
from rankine.cli import known
from rankine.discovery import get
from rankine.limits import YAML_BYTES, YAML_VALUES
from rankine.pipeline import plan
from rankine.recipe import Recipe, Stage

# -- limits ---------------------------------------------------------------------------------------
BOMB = "a0: &a0 [1, 1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))

TEXTS = {
    "": "found NoneType",
    "- 1": "found list",
    "keep: [": "expected YAML",
    "keep: 0.5\nkeep: {": "expected YAML",
    "? [a]\n: 1": "expected YAML",
    "1: 2": "names of fields",
    "null: 2": "names of fields",
    "keep: 2001-13-45": "month",
    "keep: 2001-12-24": "keep",
    "keep: !!python/object/apply:os.system ['touch ran']": "the tag",
    "keep: !!timestamp x": "the tag",
    "keep: ! x": "the tag",
    "keep: *a": "aliases",
    "set: &a {b: *a}": "aliases",
    "set: " + "{a: " * 100: "levels of nesting",
    "set: " + "[" * 10_000: "levels of nesting",
    BOMB: "values",
    "include: [" + "a," * (YAML_VALUES + 1) + "]": "values",
    "#" * (YAML_BYTES + 1): "bytes",
    "keep: \x00": "expected YAML",
    "keep: \x1b[2J": "expected YAML",
    "model: 'a\tb'\nkeep: 5": "keep",
    "keeep: 0.5": 'did you mean "keep"',
    "keep: 0.5\nmethod: svd_lm": 'did you mean "svd_llm"',
    "method: svd\nkeep: .nan": "keep",
    "method: svd\nkeep: .inf": "keep",
    "method: svd\nkeep: 1e400": "keep",
    "method: svd\nbits: -3": "bits",
    "method: rtn\nset: {code_bits: .nan}": "code_bits",
    "method: rtn\nset: {code_bits: [4]}": "code_bits",
    "method: rtn\nset: {group: 0}": "group",
    "stages: 5": "stages",
    "stages: [{}]": "stages",
    "stages: [{method: svd, keep: 0.5, evil: 1}]": "evil",
}


@pytest.fixture(scope="module")
def net():
    return tiny.llama()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("recipes") / "recipe.yaml"


def planned(file, net):
    """What `rankine plan --recipe` does, without opening the model again and again."""
    recipe = Recipe.read(file)
    known.check(recipe)
    made = plan(net, recipe=recipe)
    assert made.lines()
    json.dumps(made.to_json(), allow_nan=False)
    return recipe


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: repr(text[:30]))
def test_texts(text, file, net):
    file.write_text(text)
    with pytest.raises(UserError, match=TEXTS[text]) as caught:
        planned(file, net)
    assert "\n" not in str(caught.value)
    assert not os.path.exists("ran")


@pytest.mark.parametrize("content", [b"\xff\xfe", b"keep: caf\xe9"])
def test_no_text_at_all(content, file, refused, tiny):
    file.write_bytes(content)
    assert "UTF-8" in refused("plan", tiny, "--recipe", file)


def test_no_file_and_no_pipe(tmp_path, refused, tiny):
    assert "No such file" in refused("plan", tiny, "--recipe", tmp_path / "none.yaml")
    assert "something else" in refused("plan", tiny, "--recipe", tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "something else" in refused("plan", tiny, "--recipe", tmp_path / "pipe")


def test_anchors_are_fine_where_they_are_few(file, net):
    file.write_text("method: svd\nkeep: 0.5\ninclude: &a ['*q_proj']\nexclude: []\nfast: false\n")
    assert planned(file, net).include == ("*q_proj",)
    file.write_text("stages:\n- &a {method: svd, keep: 0.7}\n- {<<: *a, keep: 0.5}\n")
    assert [stage.keep for stage in Recipe.read(file).stages] == [0.7, 0.5]


@pytest.mark.parametrize("value", ["[", "{a: ", "*a", "!!python/name:os.system", "[" * 5000])
def test_a_knob_on_the_command_line_is_yaml_too(value, refused, tiny):
    refused("plan", tiny, "--method", "rtn", "--set", f"code_bits={value}")


# -- the fuzzer -----------------------------------------------------------------------------------
METHODS = sorted(known.catalogue())
KNOBS = sorted({knob["name"] for entry in known.catalogue().values() for knob in entry["knobs"]})

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-2, 5),
    st.sampled_from([2**31, 2**63, 10**30, -1]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        ["4GB", "0.5", "1.02x", "nan", "auto", "embedded", "16x64", "*", "a:b", "none"]
    ),
    st.dates(),
)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(scalars, inner, max_size=3),
    max_leaves=6,
)
shares = st.one_of(st.floats(0, 1), st.floats(0.3, 1), anything)
names = st.one_of(st.sampled_from(METHODS), anything)
knobs = st.one_of(
    st.dictionaries(st.sampled_from(KNOBS), scalars, max_size=2),
    st.dictionaries(st.sampled_from(KNOBS) | st.text(max_size=4), anything, max_size=3),
    anything,
)
stages = st.lists(
    st.one_of(
        st.fixed_dictionaries({"method": names}, optional={"keep": shares, "set": knobs}),
        st.dictionaries(st.sampled_from(sorted(Stage.model_fields)), anything, max_size=4),
        anything,
    ),
    max_size=3,
)
GOOD = {
    "method": names,
    "keep": shares,
    "bits": st.floats(0.5, 20) | anything,
    "size": st.integers(0, 10**6) | st.sampled_from(["20KB", "1GB", "0"]) | anything,
    "set": knobs,
    "stages": stages,
    "max_loss": st.sampled_from(["1.02x", "0.05"]) | anything,
    "dtype": st.sampled_from(["bfloat16", "float16", "float32", "auto"]) | anything,
    "tokens": st.sampled_from(["16x64", "0x0", "1x1", "99999999999999999999x3"]) | anything,
    "include": st.sampled_from(["*q_proj", "*", "nothing", "["]) | anything,
}
likely = {"method": st.sampled_from(METHODS), "keep": st.floats(0.2, 1)}
fields = st.one_of(
    st.fixed_dictionaries(likely, optional={k: v for k, v in GOOD.items() if k not in likely}),
    st.fixed_dictionaries({}, optional=GOOD),
    st.dictionaries(st.sampled_from(sorted(Recipe.model_fields)), anything, max_size=5),
    anything,
)


def outcome(file, net) -> str:
    """ "planned", or the sentence; anything else is raised."""
    try:
        planned(file, net)
    except UserError as error:
        return str(error)
    return "planned"


QUIET = {
    "phases": (Phase.generate, Phase.shrink),
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}


@pytest.mark.parametrize("part", range(4))
def test_two_thousand_recipes(part, file, net):
    """None of them ends in anything but a plan or one sentence; some of them are plans."""
    seen = []

    @seed(part)
    @settings(max_examples=500, **QUIET)
    @given(fields)
    def fuzz(data):
        file.write_text(yaml.safe_dump(data), "utf-8")
        seen.append(outcome(file, net))
        assert "\n" not in seen[-1]

    fuzz()
    assert seen.count("planned") > 5


@seed(0)
@settings(max_examples=300, **QUIET)
@given(st.text(alphabet="{}[]:,-&*!|>'\"%@`#?\n\t ab0.~<", max_size=60))
def test_texts_of_punctuation(file, net, text):
    file.write_text(text, "utf-8")
    assert outcome(file, net) != "planned"


KNOB_VALUES = {
    "lord": {"sweep": [None, 5, {"a": 1}, ["x"], "0.5,x", [float("nan")]]},
    "auto": {"structures": [None, 5, [["low_rank"]]]},
    "rtn": {"code_bits": [float("inf"), float("nan"), "x", True, 4.5, [4]]},
    "kfac_svd": {"clip": [float("nan"), "x", True, []]},
}


@pytest.mark.parametrize("method", KNOB_VALUES)
def test_knobs_of_another_type(method):
    for knob, values in KNOB_VALUES[method].items():
        for value in values:
            with pytest.raises(UserError, match=rf"expected {method}\.{knob} to be"):
                get(method, {knob: value})


def test_knobs_of_several_values():
    """As the command line, YAML and Python give them."""
    for value in ("0.5,0.25", [0.5, "0.25"], (0.5, 0.25)):
        assert get("lord", {"sweep": value}).sweep == (0.5, 0.25)
