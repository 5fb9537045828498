"""Sentences, numbers and tables: honest, and readable where the terminal is narrow."""

import itertools
import math

import pytest
import report_sample
from rich.console import Console

from rankine import report
from rankine.acceptance import figures
from rankine.report import numbers as n
from rankine.report.schema import parse
from rankine.report.terminal import cells, markdown_table
from rankine.report.verdict import quantization, verdict


def test_verdict_says_that_plain_quantization_wins():
    assert verdict(parse(report_sample.report())) == [
        "Kept 79.9 % of the targeted bits: 9.87 MB → 8.11 MB on disk.",
        "Held-out perplexity 8.12 → 8.41 (+3.6 %).",
        "Plain int8 would be 5.51 MB at 8.13: smaller and better than this result.",
    ]


@pytest.mark.parametrize(
    ("size", "loss", "judgement"),
    [
        (4.0, 8.2, "smaller and better than this result"),
        (4.0, 9.5, "smaller, at a higher perplexity"),
        (7.0, 8.2, "larger, at a lower perplexity"),
        (7.0, 9.5, "larger and worse than this result"),
    ],
)
def test_every_side_of_a_baseline(size, loss, judgement):
    result = report_sample.row("svd", "svd", "result", 0.5, 5.0, 9.0)
    plain = report_sample.row("int8", "rtn", "baseline", 0.5, size, loss)
    assert quantization(result, [result, plain]).endswith(f"{n.perplexity(loss)}: {judgement}.")


def test_the_best_of_the_better_baselines_is_named():
    result = report_sample.row("svd", "svd", "result", 0.8, 8.0, 20.0)
    sentence = quantization(result, [result, *report_sample.rows()[-2:]])
    assert sentence.startswith("Plain int8 would be")


def test_the_verdict_is_silent_about_what_was_not_measured():
    data = {"schema": "1.0", "model": {}, "rows": []}
    assert verdict(parse(data)) == ["No result was measured in this run."]
    data["rows"] = [{"kind": "result", "name": "svd", "keep": 0.7, "perplexity": math.nan}]
    assert verdict(parse(data)) == ["Kept 70.0 % of the targeted bits."]
    data["rows"] = [{"kind": "result", "name": "svd", "perplexity": 9.0}]
    assert verdict(parse(data)) == ["Held-out perplexity 9.00."]


def test_the_headline_speaks_of_the_named_row():
    data = report_sample.report() | {"subject": "svd 0.6"}
    assert "8.12 → 21.40 (+163.5 %)" in verdict(parse(data))[1]
    data["subject"] = "gone"
    assert "8.41" in verdict(parse(data))[1]  # the first result


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (n.perplexity, {8.119: "8.12", 123.44: "123.4", 12345.6: "12,346", 3.2e7: "3.2e+07"}),
        (n.seconds, {0.31: "0.3 s", 42: "42 s", 185: "3 min 5 s", 7800: "2 h 10 min"}),
        (n.percent, {0.701: "70.1 %", 1.0: "100.0 %"}),
        (n.rate, {412.4: "412", 9.31: "9.31", 12345: "12,345"}),
        (n.count, {950: "950", 2_410_000: "2.41 million", 1.1e9: "1.10 billion"}),
        (n.size, {3_200_000: "3.20 MB"}),
    ],
)
def test_numbers_for_people(text, value):
    assert {number: text(number) for number in value} == value
    for unknown in (None, math.nan, math.inf, "a", True, [1]):
        assert text(unknown) == "–"


def test_changes():
    assert n.change(9.03, 8.12) == "+11.2 %"
    assert n.change(8.0, 8.12) == "−1.5 %"
    assert n.change(1e5, 8.0) == "×12,500"
    assert n.change(9.0, None) == n.change(math.nan, 8.0) == n.change(9.0, 0) == ""


def test_a_narrow_terminal_drops_the_least_important_columns():
    rows = report_sample.rows()
    widths = (200, 80, 60, 45, 10)
    titles = [[column.title for column in cells(rows, width).columns] for width in widths]
    assert titles[0][-1] == "vs dense"
    assert titles[-1] == ["model", "on disk", "perplexity"]
    for wider, narrower in itertools.pairwise(titles):
        assert [title for title in wider if title in narrower] == narrower
    for width in widths[:-1]:
        assert max(map(len, report.plain_table(rows, width).splitlines())) <= width


def test_columns_nobody_measured_are_left_out():
    rows = [{"name": "svd", "bytes": 10, "perplexity": 9.0}]
    assert report.plain_table(rows).splitlines() == [
        "model  on disk  perplexity",
        "svd       10 B        9.00",
    ]
    assert report.plain_table([]) == "model  on disk  perplexity"


def own_rows(name="auc", **more):
    """Of a model of the user's own: no perplexity, figures by name."""
    return [
        {"name": "dense", "kind": "dense", "bytes": 100, "metrics": {name: 0.91234}, **more},
        {"name": "svd", "kind": "result", "bytes": 50, "metrics": {name: 0.87, "other": 1e-7}},
    ]


def test_figures_of_the_users_own_have_columns():
    assert report.plain_table(own_rows()).splitlines() == [
        "model  on disk     auc  other",
        "dense    100 B  0.9123      –",
        "svd       50 B    0.87  1e-07",
    ]
    both = [{"name": "svd", "bytes": 1, "perplexity": 9.0, "metrics": {"auc": 0.5}}]
    assert report.plain_table(both).splitlines()[0].split()[-2:] == ["perplexity", "auc"]
    loss = [{"name": "svd", "bytes": 1, "loss": 0.25}]
    assert report.plain_table(loss).splitlines()[0] == "model  on disk  loss"
    said = verdict(parse({"schema": "1.1", "model": {}, "rows": own_rows()}))
    assert said[-1] == "Measured auc 0.9123 → 0.87, other 1e-07."


def test_names_of_figures_are_text():
    attack = "<b>|\x1b[31m"
    assert "\x1b" not in report.plain_table(own_rows(attack))
    head = markdown_table(own_rows(attack)).splitlines()[0]
    assert "<b>" not in head
    assert head.count("|") - head.count("\\|") == 5


@pytest.mark.parametrize("bad", [None, [], "many", {"auc": None}, {"auc": "high"}, {1: 0.5}])
def test_strange_metrics_do_not_stop_the_table(bad):
    rows = [*own_rows(), {"name": "other", "bytes": 1, "metrics": bad}]
    assert len(report.plain_table(rows).splitlines()) == 4
    assert set(figures(rows[-1])) <= {"bytes", "1"}


def test_ratio_to_dense_is_derived_where_it_is_not_given():
    rows = [
        {"name": "dense", "kind": "dense", "tokens_per_second": 100.0},
        {"name": "svd", "kind": "result", "tokens_per_second": 125.0},
    ]
    assert "1.25×" in report.plain_table(rows)


@pytest.mark.parametrize("width", [120, 80, 50])
def test_rich_shows_the_same_cells(width):
    rows = report_sample.rows()
    console = Console(width=width, record=True, force_terminal=False)
    console.print(report.table(rows, width))
    shown = [line.split() for line in console.export_text().splitlines() if "─" not in line]
    plain = [line.split() for line in report.plain_table(rows, width).splitlines()]
    assert shown == plain


def test_a_name_cannot_drive_the_terminal():
    rows = [{"name": "\x1b[31mred\n", "bytes": 1, "perplexity": 2.0}]
    assert "?[31mred?" in report.plain_table(rows)
    console = Console(width=60, record=True, force_terminal=False)
    console.print(report.table(rows), report.table([{"name": "[bold]x[/bold]"}]))
    text = console.export_text()
    assert "\x1b" not in text
    assert "[bold]x[/bold]" in text


def test_the_card_section():
    text = report.cost(report_sample.report())
    assert text.startswith("Kept 79.9 % of the targeted bits: 9.87 MB → 8.11 MB on disk.")
    lines = text.splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + len(report_sample.rows())
    assert len({line.count("|") for line in table}) == 1
    assert any(line.startswith("| int4 (plain) | 28.1 % | 3.52 MB |") for line in table)
    assert "method: auto" in lines


def test_a_card_shows_strange_names_as_they_are():
    data = report_sample.report()
    data["rows"][0]["name"] = "a|b <script> [x](y)\n# head"
    data["recipe"]["calibration"] = "```\n# out"
    text = report.cost(data)
    assert "a\\|b &lt;script> \\[x\\](y) \\# head" in text
    assert "<script" not in text
    assert text.count("````") == 2  # the fence is longer than any in it
