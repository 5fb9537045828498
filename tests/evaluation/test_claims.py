"""How measured claims become rows and pages; that they hold is no test."""

import importlib
import json

import pytest
from benchmarks.claims import harness, pages
from benchmarks.claims.__main__ import systems
from benchmarks.claims.harness import Lab, Row


def row(claim, value, **fields):
    return Row("svd", claim, "keep 0.5", "dense", 2.0, value, "perplexity", value < 3, **fields)


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A place of its own for the rows."""
    for module in (harness, pages):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "claims.json")
    return lambda: {(r["claim"], r["profile"]): r for r in json.loads(harness.RESULTS.read_text())}


@pytest.mark.parametrize("name", systems())
def test_every_claim_has_a_title_and_a_place_on_its_methods_page(name):
    assert importlib.import_module(f"benchmarks.claims.{name}").TITLE.startswith(f"{name}: ")
    page = (pages.DOCS / "methods" / f"{name}.md").read_text("utf-8")
    assert 0 <= page.find(pages.BEGIN) < page.find(pages.END)


def test_rows_of_data_that_is_not_at_hand_stay(results, tmp_path):
    real = row("on SST-2", 2.5, given=True, data="SST-2", on="an encoder")
    harness.write_rows(Lab("svd", data=tmp_path), [row("gone", 1.0), real], "measure")
    harness.write_rows(Lab("svd"), [row("on text", 2.0)], "measure")
    found = results()
    assert set(found) == {("on SST-2", "quick"), ("on text", "quick")}
    assert found["on SST-2", "quick"]["model"] == "an encoder"
    assert found["on text", "quick"]["model"] == "embedded"
    assert "standard library" in found["on text", "quick"]["data"]
    harness.write_rows(Lab("svd", data=tmp_path), [row("on text", 2.0)], "measure")
    assert set(results()) == {("on text", "quick")}


def test_pages_show_the_fullest_row_and_why_a_claim_fails(results):
    why = "the model has no slack"
    harness.write_rows(Lab("svd", full=True), [row("ours", 4.0, why=why)], "measure")
    harness.write_rows(Lab("svd"), [row("ours", 2.0), row("other", 1.0)], "measure")
    (shown,) = (r for r in pages.fullest() if r["claim"] == "ours")
    assert shown["profile"] == "full"
    text = "\n".join(pages._all_claims(pages.fullest(), ["svd"]))
    assert "| ours | keep 0.5 | dense 2 | 4 perplexity |  | 3 | full | **fails** (assert) |" in text
    assert f"- *ours* (keep 0.5): {why}" in text
    assert "1 of 2 asserted statements hold" in "\n".join(pages._of_method(pages.fullest()))
