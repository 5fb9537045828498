"""What the wheel holds, what it asks for, and that it works where nothing else of us is."""

import configparser
import json
import zipfile

import pytest
from packaging.requirements import Requirement

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def files(wheel):
    """Name → bytes."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def metadata(files, name):
    """A file of the dist-info directory, as text."""
    (path,) = [n for n in files if n.endswith(f".dist-info/{name}")]
    return files[path].decode()


@pytest.mark.process  # the first to ask for the wheel, which is built then
def test_it_holds_all_that_a_run_needs_and_nothing_else(files):
    for name in (
        "py.typed",
        "assets/catalogue.json",
        "assets/embedded/config.json",
        "assets/embedded/model.safetensors",
        "assets/embedded/tokenizer.json",
        "checkpoint/modeling_rankine.py",
        "kernels/fused.c",
        "report/template.html",
        "testing/test_method.py",
        "testing/templates/method.py.txt",
    ):
        assert f"rankine/{name}" in files, name
    tops = {name.split("/")[0] for name in files if ".dist-info/" not in name}
    assert tops == {"rankine", "_rankine_pytest.py"}
    assert not [name for name in files if "constraints" in name or name.endswith(".pyc")]


def test_its_entry_points(files):
    found = configparser.ConfigParser()
    found.read_string(metadata(files, "entry_points.txt"))
    assert found["console_scripts"]["rankine"] == "rankine.cli:main"
    assert dict(found["pytest11"]) == {"_rankine_pytest": "_rankine_pytest"}


def test_it_asks_for_lower_bounds_only(files):
    lines = metadata(files, "METADATA").splitlines()
    asked = [Requirement(x.partition(": ")[2]) for x in lines if x.startswith("Requires-Dist")]
    for requirement in asked:
        operators = {specifier.operator for specifier in requirement.specifier}
        assert operators <= {">="}, requirement
    (torch,) = [r for r in asked if r.name == "torch"]
    for version in ("2.6.0", "2.13.0+cpu", "2.9.1+cu130", "2.6.0a0+ecf3bae40a.nv25.01", "3.0"):
        assert torch.specifier.contains(version, prereleases=True), version
    assert not torch.specifier.contains("2.5.1")


@pytest.mark.process
def test_installing_it_left_torch_alone(environment):
    """pip took the torch that it saw: only ours was put into the environment."""
    found = {path.name for path in environment.packages.glob("*.dist-info")}
    assert {name.split("-")[0] for name in found} == {"rankine", "rankine_my_svd"}


@pytest.mark.process
def test_it_runs_from_there(environment):
    code = "import rankine; print(rankine.__file__)"
    assert str(environment.packages) in environment.run("python", "-c", code)
    assert environment.run("python", "-m", "rankine", "--version").startswith("rankine ")


@pytest.mark.process
def test_the_quick_demo(environment):
    printed = environment.run("rankine", "demo", "--quick", "-o", "made", "--threads", 1)
    for part in ("dense", "int4 (plain)", "auto 0.60", "before:", "after:"):
        assert part in printed
    assert "svd" not in printed, "one method, one size"
    made = environment.cwd / "made"
    assert (made / "report.html").stat().st_size > 10_000
    assert {"config.json", "model.safetensors"} <= {p.name for p in (made / "auto-0.6").iterdir()}


@pytest.mark.process
def test_a_package_of_methods_is_in_the_catalogue_and_on_the_command_line(environment):
    found = json.loads(environment.run("rankine", "methods", "--json"))["methods"]
    (mine,) = [entry for entry in found if entry["name"] == "my_svd"]
    assert [(knob["name"], knob["default"]) for knob in mine["knobs"]] == [("shrink", 0.1)]
    small = ("--tokens", "2x32", "--eval-tokens", 200, "--include", "*.layers.0.*", "--threads", 1)
    asked = ("--method", "my_svd", "--keep", 0.7, "--set", "shrink=0.2")
    ran = environment.run("rankine", "compress", "embedded", *asked, *small, "-o", "mine", "--json")
    assert json.loads(ran)["report"]["result"]["knobs"] == {"shrink": 0.2}


@pytest.mark.process
def test_a_package_of_methods_is_held_to_the_same_checks(environment):
    asked = ("--rankine-method", "my_svd", "--rankine-keep", 0.6, "-p", "no:cacheprovider")
    printed = environment.run("python", "-m", "pytest", "--pyargs", "rankine.testing", *asked)
    assert " passed" in printed
    assert "failed" not in printed
