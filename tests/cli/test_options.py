"""One vocabulary: command-line option = keyword of rankine.compress = field of Recipe."""

import inspect
import shlex

import pytest
import yaml

import rankine
from rankine.cli import make, options
from rankine.cli.app import app
from rankine.engine import record
from rankine.errors import UserError
from rankine.method import get
from rankine.recipe import Recipe

#: What a command adds that decides nothing about the result.
OWN = {"recipe", "output", "json", "named_model", "allow_code", "timeout"}
#: A value that differs from each field's default, as typed and as the recipe holds it.
TYPED = {
    "model": ("dir", "dir"),
    "into": ("my.nets:build", "my.nets:build"),
    "allow_pickle": (True, True),
    "method": ("svd", "svd"),
    "keep": ("0.5", 0.5),
    "size": ("4GB", "4GB"),
    "bits": ("3.5", 3.5),
    "paper_ratio": ("0.2", 0.2),
    "max_loss": ("1.02x", "1.02x"),
    "calibration": ("a.txt", "a.txt"),
    "evaluation": ("b.txt", "b.txt"),
    "forward": ("nets:forward", "nets:forward"),
    "loss": ("nets:loss", "nets:loss"),
    "evaluate": ("nets:metrics", "nets:metrics"),
    "accept": ("auc>=0.8", ("auc>=0.8",)),
    "tokens": ("8x64", "8x64"),
    "eval_tokens": ("100", 100),
    "text_column": ("body", "body"),
    "device": ("cpu", "cpu"),
    "dtype": ("float32", "float32"),
    "memory": ("4GB", "4GB"),
    "threads": ("3", 3),
    "seed": ("7", 7),
    "include": ("*.mlp.*", ("*.mlp.*",)),
    "exclude": ("*.lm_head", ("*.lm_head",)),
    "fast": (True, True),
    "fused": (True, True),
    "work": ("w", "w"),
    "fresh": (True, True),
    "force": (True, True),
    "set": ("structures=low_rank", {"structures": "low_rank"}),
}


def command_of(name):
    import typer

    return typer.main.get_command(app).commands[name]


def recipe_of(arguments):
    """The recipe that these arguments of `compress` make."""
    seen = []
    probe = options.takes_recipe()(lambda recipe: seen.append(recipe))
    import typer

    small = typer.Typer(add_completion=False)
    small.command()(probe)
    small(arguments, standalone_mode=False)
    return seen[0]


def test_every_field_is_an_option_and_the_other_way_round():
    names = {parameter.name for parameter in command_of("compress").params} - {"help"}
    assert names - OWN == set(Recipe.model_fields) - options.FILE_ONLY
    flags = {p.name: p.opts[0] for p in command_of("compress").params if p.name not in OWN}
    for name in set(Recipe.model_fields) - options.FILE_ONLY - {"model"}:
        assert flags[name] == "--" + name.replace("_", "-")


def test_the_table_of_typed_values_is_whole():
    assert set(TYPED) == set(Recipe.model_fields) - options.FILE_ONLY


@pytest.mark.parametrize("name", TYPED)
def test_option_keyword_and_field_give_the_same_recipe(name):
    typed, held = TYPED[name]
    flag = "--" + options.option(name)
    budget = [] if name in ("keep", "size", "bits", "paper_ratio") else ["--keep", "0.9"]
    if name == "model":
        arguments = [typed]
    elif name == "set":
        arguments = [flag, typed]
    else:
        arguments = [flag] if typed is True else [flag, typed]
    keyword = {name: held}
    if budget:
        keyword["keep"] = 0.9
    made = recipe_of([*arguments, *budget])
    assert made == Recipe.of(**keyword)
    assert getattr(made, name) == held


def test_the_model_may_be_an_option():
    assert recipe_of(["--model", "nets:build", "--keep", "0.9"]).model == "nets:build"
    with pytest.raises(UserError, match="name it once"):
        recipe_of(["a", "--model", "b", "--keep", "0.9"])


@pytest.mark.parametrize(("typed", "held"), [("no", False), ("yes", True), ("m:f", "m:f")])
def test_evaluate_is_a_function_or_a_word(typed, held):
    assert recipe_of(["--evaluate", typed, "--keep", "0.9"]).evaluate == held


def test_several_conditions():
    arguments = ["--accept", "auc >= 0.8", "--accept", "loss<1e-1", "--keep", "0.9"]
    found = [tuple(c) for c in recipe_of(arguments).conditions()]
    assert found == [("auc", ">=", 0.8), ("loss", "<", 0.1)]


def test_keywords_of_compress_are_the_fields():
    kinds = inspect.signature(rankine.compress).parameters
    assert set(kinds) & set(Recipe.model_fields) == {"model"}, "a second place for a field"
    assert kinds["fields"].kind is inspect.Parameter.VAR_KEYWORD
    with pytest.raises(UserError, match='unknown option "kep"; did you mean "keep"'):
        rankine.compress("embedded", kep=0.5)


@pytest.mark.parametrize(
    ("verb", "function"),
    [
        ("plan", "plan"),
        ("compare", "compare"),
        ("eval", "evaluate"),
        ("heal", "heal"),
        ("export", "export"),
        ("inspect", "inspect"),
    ],
)
def test_options_of_every_verb_are_keywords_in_python(verb, function):
    """Options that only decide how the process runs or prints have no keyword."""
    parameters = inspect.signature(getattr(rankine, function)).parameters
    keywords = set(parameters)
    if "fields" in parameters:
        keywords |= set(Recipe.model_fields) | {"mode"}
    places = {"where": "model", "directory": "model"}
    options_ = {places.get(p.name, p.name) for p in command_of(verb).params}
    keywords = {places.get(name, name) for name in keywords}
    assert options_ - keywords <= {*OWN, "help", "threads"} - {"output"}


def test_a_recipe_file_underlies_the_options(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"method": "svd", "keep": 0.8, "seed": 3}))
    made = recipe_of(["--recipe", str(file), "--keep", "0.6"])
    assert (made.method, made.keep, made.seed) == ("svd", 0.6, 3)


def test_a_chain_is_changed_in_its_file(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"stages": [{"method": "svd", "keep": 0.8}]}))
    assert recipe_of(["--recipe", str(file)]).chain()[0].keep == 0.8
    with pytest.raises(UserError, match="the keep of a chain in its stages"):
        recipe_of(["--recipe", str(file), "--keep", "0.6"])


@pytest.mark.parametrize("field", [{"keep": 0.6}, {"paper_ratio": 0.2}, {"method": "lord"}])
def test_a_chain_has_no_fields_of_a_stage_beside_it(field):
    """They would be ignored."""
    (name,) = field
    with pytest.raises(UserError, match=f"the {name} of a chain in its stages"):
        Recipe.of(stages=[{"method": "svd", "keep": 0.8}], **field)


def test_verbs():
    assert set(typer_names()) == {
        "plan", "compress", "compare", "heal", "eval", "inspect", "generate", "report", "methods",
        "export", "demo", "doctor", "new-method",
    }  # fmt: skip


def typer_names():
    import typer

    return typer.main.get_command(app).commands


def test_every_option_is_explained():
    for name, command in typer_names().items():
        for parameter in command.params:
            assert parameter.help or parameter.name == "help", (name, parameter.name)
        assert command.help, name


def test_make_lists_methods_and_sizes():
    assert make._names("svd, auto") == ["svd", "auto"]
    assert make._numbers("0.8,0.6") == [0.8, 0.6]
    with pytest.raises(UserError, match=r"0\.8,0\.6"):
        make._numbers("a")


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "svd", "keep": 0.5},
        {"model": "a model/with spaces", "size": "4GB", "include": ("*.q_proj", "*.k_proj")},
        {"bits": 3.5, "fast": True, "evaluate": False, "accept": ("auc>=0.80",)},
        {"keep": 0.5, "set": {"structures": ("low_rank", "pivoted"), "refine": True, "clip": None}},
    ],
)
def test_the_reports_command_makes_the_same_recipe(fields, tmp_path):
    recipe = Recipe.of(**fields, work=str(tmp_path), fresh=True)
    said = record.command(recipe, tmp_path / "out")
    program, verb, *arguments, flag, output = shlex.split(said)
    assert (program, verb, flag, output) == ("rankine", "compress", "-o", str(tmp_path / "out"))
    made = recipe_of(arguments)
    assert made.chain()[0].method == recipe.chain()[0].method
    assert get(made.method, made.set) == get(recipe.method, recipe.set)
    places = {"set": {}, "work": None, "fresh": False}
    assert made.model_copy(update=places) == recipe.model_copy(update=places)


def test_no_options_make_a_chain_or_a_users_own_objects(tmp_path):
    chain = Recipe.of(stages=[{"method": "svd", "keep": 0.5}])
    objects = Recipe.of(keep=0.5, method="svd", forward=lambda model, batch: model(batch))
    assert record.command(chain, tmp_path) is None
    assert record.command(objects, tmp_path) is None
