"""Discovery and legality: what is registered is found, and the cards decide what follows what."""

import importlib
import re
import sys
from dataclasses import dataclass

import pytest

import rankine
import tiny_models as tiny
from rankine import method as methods
from rankine.anatomy import describe, weight_targets
from rankine.engine.plan import check_chain
from rankine.errors import UserError
from rankine.method import Card, Compressor, Method, catalogue, get


def card(name, family="low-rank", **more):
    return Card(name, "a title", "a test", family, "a summary", **more)


def made(name, family="low-rank", **more):
    """A method of that card, unregistered."""

    @dataclass(frozen=True)
    class Made(Compressor):
        card = globals()["card"](name, family, **more)

    return Made


@pytest.fixture
def registry(monkeypatch):
    """Registrations that end with the test."""
    catalogue()
    monkeypatch.setattr(methods, "_METHODS", dict(methods._METHODS))


def test_packages_are_walked_once(monkeypatch):
    catalogue()

    def refuse(*_args, **_kwargs):
        raise AssertionError("walked again")

    monkeypatch.setattr(importlib, "import_module", refuse)
    monkeypatch.setattr(importlib.metadata, "entry_points", refuse)
    assert "svd" in catalogue()


def test_what_is_registered_later_is_seen(registry):
    assert "later" not in catalogue()
    with pytest.raises(UserError, match="unknown method"):
        get("later")
    rankine_method = methods.method(made("later"))
    assert catalogue()["later"] is rankine_method
    assert isinstance(get("later"), rankine_method)
    assert list(catalogue()) == sorted(catalogue())


def test_the_catalogue_is_the_callers_own():
    catalogue().clear()
    assert "svd" in catalogue()


def test_a_method_with_other_knobs():
    assert get(get("auto"), {"ridge": "0.5"}) == get("auto", {"ridge": 0.5})
    with pytest.raises(UserError, match='auto has no knob "rigde"; did you mean "ridge"'):
        get(get("auto"), {"rigde": 1})


def test_two_methods_of_one_name(registry):
    other = made("svd")
    with pytest.raises(UserError, match="two methods"):
        methods.method(other)
    methods.method(catalogue()["svd"])  # the same again: a module that is loaded twice


def test_every_file_of_the_package_registers_its_name():
    for name, cls in catalogue().items():
        if cls.__module__.startswith("rankine.methods."):
            assert sys.modules[cls.__module__].__file__.endswith(f"{name}.py")


# -- legality -----
def chain(*stages):
    check_chain([cls() for cls in stages])


def test_both_cards_must_agree():
    low, codes = made("low"), made("codes", "quantization", after=("dense", "low-rank"))
    last = made("last", before=())
    only = made("only", before=("training",))
    heal = type(get("heal"))
    chain(low, codes)
    chain(low, heal, codes)
    chain(only, heal, codes)
    with pytest.raises(UserError, match="low cannot follow a quantization stage: it takes dense"):
        chain(codes, low)
    with pytest.raises(UserError, match="codes cannot follow last, which may be followed by noth"):
        chain(last, codes)
    with pytest.raises(UserError, match=r"codes cannot follow only, .* by training; reorder"):
        chain(only, codes)


def test_training_leaves_what_stood():
    low, heal = made("low"), type(get("heal"))
    chain(heal, low)
    with pytest.raises(UserError, match="low cannot follow a low-rank stage"):
        chain(low, heal, low)


def test_families_on_cards_are_families_that_exist():
    """A card that names a family nobody has would promise a chain that cannot be written."""
    families = {cls.card.family for cls in catalogue().values()} | {"dense"}
    for name, cls in catalogue().items():
        named = {*cls.card.after, *(cls.card.before or ())}
        assert named <= families, name


# -- knobs -----
def test_get_takes_a_method_as_it_is():
    given = get("auto", {"ridge": "1e-3"})
    assert isinstance(given, Method)
    assert get(given) == given
    assert get(given, {"refine": True}).knobs()["refine"] is True


def test_a_runtime_is_no_stage():
    with pytest.raises(UserError, match="runs a finished model"):
        rankine.plan(tiny.llama(), stages=[{"method": "svd", "keep": 0.5}, {"method": "fused"}])


@pytest.mark.parametrize(
    ("kind", "build", "include"),
    [("bank", tiny.mixtral, "*.experts.*"), ("embedding", tiny.llama, "*.embed_tokens")],
)
def test_who_takes_what_is_named_where_it_is_refused(kind, build, include):
    """The anatomy knows no methods: its sentences hold their names as words."""
    with pytest.raises(UserError) as caught:
        weight_targets(describe(build()), [include])
    compressors = {n: cls for n, cls in catalogue().items() if issubclass(cls, Compressor)}
    named = {name for name in compressors if re.search(rf"\b{name}\b", str(caught.value))}
    assert named == {name for name, cls in compressors.items() if kind in cls.card.takes}
