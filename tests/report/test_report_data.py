"""The schema: what a report may hold, how it is read back, and what is refused."""

import json
import math

import numpy as np
import pytest
import report_sample

from rankine import report
from rankine.errors import UserError
from rankine.report.maps import maps
from rankine.report.schema import SCHEMA, clean, parse

MINIMAL = {"schema": "1.0", "model": {}, "rows": []}


def test_json_round_trip(tmp_path):
    data = report_sample.short()
    report.write(data, tmp_path)
    assert report.read(tmp_path) == data
    assert report.read(tmp_path / "report.json") == data


def test_a_report_is_rendered_again_from_its_json(tmp_path):
    report.write(report_sample.short(), tmp_path)
    before = (tmp_path / "report.html").read_text(encoding="utf-8")
    report.write(report.read(tmp_path), tmp_path)
    after = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert len(after) == pytest.approx(len(before), rel=1e-3)  # Bokeh numbers its models anew


def test_json_holds_no_nan(tmp_path):
    data = report_sample.short()
    data["rows"][1]["perplexity"] = math.nan
    data["times"]["solve"] = math.inf
    data["targets"][0]["spectrum"] = np.array([1.0, np.nan], dtype=np.float32)
    report.write(data, tmp_path)

    def refuse(name):
        raise AssertionError(f"{name} in report.json")

    text = (tmp_path / "report.json").read_text(encoding="utf-8")
    back = json.loads(text, parse_constant=refuse)
    assert back["rows"][1]["perplexity"] is None
    assert back["times"]["solve"] is None
    assert back["targets"][0]["spectrum"] == [1.0, None]


def test_clean_makes_plain_values(tmp_path):
    found = clean({1: np.int64(3), "p": tmp_path, "t": (np.float32(0.5), np.bool_(True)), "s": {2}})
    assert found == {"1": 3, "p": str(tmp_path), "t": [0.5, True], "s": [2]}


@pytest.mark.parametrize("field", ["schema", "model", "rows"])
def test_required_fields(field):
    data = {key: value for key, value in MINIMAL.items() if key != field}
    with pytest.raises(UserError, match=f'expected "{field}" in the report, found none'):
        parse(data)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rows": {"a": 1}}, 'expected a list in "rows" of the report, found dict'),
        ({"recipe": "svd"}, 'expected an object in "recipe" of the report, found str'),
        ({"targets": ["q"]}, 'expected objects in "targets" of the report'),
        ({"schema": "2.0"}, f'expected a report of schema {SCHEMA} or older, found "2.0"'),
        ({"schema": "new"}, f'expected a report of schema {SCHEMA} or older, found "new"'),
    ],
)
def test_wrong_shapes_are_one_sentence(change, said):
    with pytest.raises(UserError, match=said):
        parse({**MINIMAL, **change})


@pytest.mark.parametrize(
    "place",
    [
        ("plan", "runs_on"), ("plan", "notes"), ("budget", "asked"), ("targets", 0, "shape"),
        ("targets", 0, "spectrum"), ("targets", 0, "spectrum_ranks"), ("targets", 0, "blocks"),
    ],
)  # fmt: skip
def test_wrong_shapes_inside_are_one_sentence_too(place):
    data = at = report_sample.short()
    for step in place[:-1]:
        at = at[step]
    at[place[-1]] = 5
    with pytest.raises(UserError, match=f'in "{place[-1]}" of the report, found int'):
        parse(data)


def test_odd_values_are_shown_as_they_are(tmp_path):
    data = report_sample.short()
    row = data["rows"][1]
    row |= {"name": {"a": [1]}, "metrics": {"a": [1]}, "perplexity_interval": [1e-320, 1e300]}
    data["warnings"] = [{"a": 1}, 5]
    both = report.combine([data, data])
    assert both["warnings"] == ["{'a': 1}", "5"]
    assert len(both["rows"]) == len(data["rows"])
    report.write(both, tmp_path)


def test_a_newer_minor_schema_and_unknown_fields_pass():
    assert parse({**MINIMAL, "schema": "1.9", "search": {"tried": 3}})["rows"] == []


def test_reading_what_is_no_report(tmp_path):
    with pytest.raises(UserError, match=r"expected a report\.json at"):
        report.read(tmp_path)
    path = tmp_path / "report.json"
    path.write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="found a damaged file"):
        report.read(tmp_path)
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(UserError, match="expected a JSON object"):
        report.read(tmp_path)


def test_a_strangers_report_is_one_sentence_or_a_page(tmp_path):
    deep = "[" * 900 + "]" * 900
    rows = f'[{{"name": "a\\u001b", "bytes": 1{"0" * 400}}}]'
    fields = f'"schema": "1.0", "model": {{}}, "rows": {rows}'
    path = tmp_path / "report.json"
    path.write_text(f'{{{fields}, "recipe": {{"a": {deep}}}}}', encoding="utf-8")
    with pytest.raises(UserError, match="levels of nesting"):
        report.read(tmp_path)
    path.write_text(f"{{{fields}}}", encoding="utf-8")
    assert "a?" in report.plain_table(report.read(tmp_path)["rows"])
    report.write(report.read(tmp_path), tmp_path)


def test_nothing_is_written_for_a_bad_report(tmp_path):
    with pytest.raises(UserError):
        report.write({"schema": "1.0"}, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_combined_runs_have_each_row_once():
    first, second = report_sample.report(), report_sample.report()
    second["rows"].append(report_sample.row("auto 0.5", "auto", "result", 0.5, 5.4, 11.0))
    both = report.combine([first, second])
    assert [row["name"] for row in both["rows"]][:3] == ["dense", "int8 (plain)", "int4 (plain)"]
    assert len(both["rows"]) == len(first["rows"]) + 1
    assert both["subject"] == "auto 0.8"
    assert both["warnings"] == first["warnings"]


def test_combined_runs_on_other_text_are_flagged():
    first, second = report_sample.report(), report_sample.report()
    second["fingerprints"]["data"] = "0123456789"
    assert "another data fingerprint" in report.combine([first, second])["warnings"][-1]
    with pytest.raises(UserError, match="at least one report"):
        report.combine([])


def test_layers_that_share_have_a_cell_each():
    shared = {"id": "group:a+b", "role": "q", "block": 0, "blocks": [0, 1], "keep": 0.5}
    alone = {"id": "c", "role": "o", "block": 1, "blocks": [1], "keep": 0.25}
    (kept,) = maps([shared, alone])
    assert kept.roles == ["q", "o"]
    cells = [[cell and cell.target for cell in row] for _, row in kept.rows]
    assert cells == [["group:a+b", None], ["group:a+b", "c"]]
