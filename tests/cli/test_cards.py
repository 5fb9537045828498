"""Citations, and methods of other packages in the catalogue."""

import json
import re

import pytest

from rankine.cards import bibtex
from rankine.cli import known
from rankine.errors import UserError

PUBLISHED = [
    e for e in known.catalogue().values() if not e["ours"] and e["reference"] != "baseline"
]


def fields(text):
    """Of one BibTeX entry."""
    return dict(re.findall(r"^  (\w+) = \{(.*)\},$", text, re.MULTILINE))


@pytest.mark.parametrize("entry", PUBLISHED, ids=lambda e: e["name"])
def test_every_published_method_has_a_citation(entry):
    text = bibtex(entry)
    assert text.startswith(f"@misc{{{entry['name']},\n")
    assert text.endswith("\n}")
    assert text.count("{") == text.count("}")
    found = fields(text)
    assert entry["title"] in found["title"]
    assert re.fullmatch(r"(19|20)\d\d", found["year"])
    assert {"url", "howpublished"} & set(found)
    assert all(re.fullmatch(r"[^,]+, [^,]+", one) for one in found["author"].split(" and "))


def test_of_a_preprint_of_an_article_and_of_nothing(rankine):
    ran = rankine("methods", "svd_llm", "--cite", "--json")
    found = fields(json.loads(ran.out)["bibtex"])
    assert found["eprint"] == "2403.07378"
    assert (found["archivePrefix"], found["year"]) == ("arXiv", "2024")
    assert "Zhang, Mi" in found["author"]
    assert fields(rankine("methods", "svd", "--cite").out)["doi"] == "10.1007/BF02288367"
    for name, part in (("auto", "Rankine's own"), ("rtn", "baseline"), ("sdv", "did you mean")):
        ran = rankine("methods", name, "--cite")
        assert ran.code == 2
        assert part in ran.sentence
    assert "methods NAME --cite" in rankine("methods", "--cite").sentence


def test_a_package_that_cannot_be_imported_is_named(monkeypatch, tmp_path):
    from rankine import discovery

    broken = tmp_path / "broken_methods-1.dist-info"
    broken.mkdir()
    (broken / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-methods\nVersion: 1\n")
    (broken / "entry_points.txt").write_text("[rankine.methods]\nmine = no_such_module_here\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    discovery._import_methods.cache_clear()
    try:
        with pytest.raises(UserError, match="package broken-methods, found ModuleNotFoundError"):
            discovery.catalogue()
    finally:
        discovery._import_methods.cache_clear()
