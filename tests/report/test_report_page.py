"""The page: complete, escaped, small, and true to partial runs."""

import base64
import hashlib
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import report_sample

from rankine import report
from rankine.report.charts import Axis, log_ticks
from rankine.report.labels import CHARACTER, HEIGHT, place
from rankine.report.maps import maps, shares
from rankine.report.palette import COLOURS, twins
from rankine.report.schema import parse
from rankine.report.spectra import spectrum
from rankine.report.tradeoff import LOSS, points_of, quality_of, tradeoff

ATTACK = "</script><script>document.title='taken'</script><img src=x onerror=alert(1)>\"'"


class Reader(HTMLParser):
    """Tags, their attributes, and the text outside scripts."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.scripts: list[str] = []
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data


@pytest.fixture(scope="module")
def whole():
    """The page of the whole sample."""
    return report.html(report_sample.report())


def everywhere(value, attack):
    """The same data with an attack behind every string."""
    if isinstance(value, dict):
        return {key + attack: everywhere(item, attack) for key, item in value.items()}
    if isinstance(value, list):
        return [everywhere(item, attack) for item in value]
    return value + attack if isinstance(value, str) else value


def test_the_page_holds_every_part(whole):
    page = Reader(whole)
    for heading in (
        *("Size against quality", "What each layer gave", "Spectra and the cut"),
        *("Where the bytes went", "Samples", "Plan and outcome", "How to do it again"),
    ):
        assert heading in page.text
    assert "rankine compress embedded --method auto" in page.text
    assert "47d1b6aa90" in page.text
    assert report_sample.AFTER in page.text
    cells = [attrs for tag, attrs in page.tags if tag == "td" and "data-target" in attrs]
    assert len(cells) == 2 * 7 * report_sample.BLOCKS
    charts = json.loads(page.scripts[0])
    assert charts["tradeoff"]["wide"]["doc"]
    assert len([chart for chart in charts["spectra"] if chart]) == 7


def test_the_page_is_light_and_self_contained(whole):
    assert len(whole.encode()) < 2_000_000
    sources = [
        value
        for _, attrs in Reader(whole).tags
        for name, value in attrs.items()
        if name in ("src", "href", "srcset", "action", "data")
    ]
    assert sources == ["data:,"]


def test_the_policy_names_exactly_the_scripts_of_the_page(whole):
    page = Reader(whole)
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv"))
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert "connect-src" not in rules
    hashes = [
        base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        for script in page.scripts[1:]
    ]
    assert rules["script-src"] == " ".join(f"'sha256-{digest}'" for digest in hashes)


def test_every_string_is_escaped(whole):
    plain = Reader(whole)
    data = report_sample.short()
    for key, value in data.items():
        if key not in ("schema", "rows", "targets", "samples", "model", "plan", "budget"):
            data[key] = everywhere(value, ATTACK)
    for table in ("rows", "targets", "samples"):
        data[table] = [
            {k: everywhere(v, ATTACK) if k != "kind" else v for k, v in item.items()}
            for item in data[table]
        ]
    for entry in ("model", "plan", "budget"):
        data[entry] = {key: everywhere(value, ATTACK) for key, value in data[entry].items()}
    page = Reader(report.html(data))
    assert len(page.scripts) == len(plain.scripts) == 3
    assert "img" not in {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert page.text.count(ATTACK) > 50
    assert page.scripts[1:] == plain.scripts[1:]  # only the data differ


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0, 0, None, "many", [], {}])
def test_strange_numbers_do_not_stop_the_page(bad):
    data = report_sample.short()
    for row in data["rows"][1:3]:
        row.update(perplexity=bad, bytes=bad, keep=bad, tokens_per_second=bad)
        row.update(perplexity_interval=[bad, 1.0], ratio_to_dense=bad)
    for target in data["targets"][:1]:
        target.update(rank=bad, keep=bad, bits=bad, error=bad, loss=bad, block=bad)
        target.update(spectrum=[1.0, bad, 0.1], spectrum_ranks=[0, 1, bad], shape=[bad, 8])
    data["bytes"]["q"] = data["times"]["survey"] = data["plan"]["seconds"] = bad
    data["model"]["parameters"] = bad
    text = Reader(report.html(data)).text
    assert not re.search(r"\bnan\b|\binf\b|\bNone\b", text)


@pytest.mark.parametrize("dropped", [None, *report_sample.report()])
def test_partial_runs_render(dropped):
    required = ("schema", "model", "rows")
    data = {"schema": "1.0", "model": {}, "rows": []}
    if dropped is not None:
        data = report_sample.short()
        if dropped in required:
            data[dropped] = {"schema": "1.0", "model": {}, "rows": []}[dropped]
        else:
            del data[dropped]
    assert "Rankine report" in Reader(report.html(data)).text


def test_empty_rows_and_targets_render():
    data = report_sample.report() | {"rows": [{}, {}], "targets": [{}, {}], "samples": [{}]}
    assert "No result was measured" in Reader(report.html(data)).text


def test_maps_put_every_target_in_its_place():
    kept, error = maps(parse(report_sample.report())["targets"])
    assert kept.roles == ["q", "k", "v", "o", "gate", "up", "down"]
    assert [name for name, _ in kept.rows] == [str(block) for block in range(7)]
    target = report_sample.target("gate", 3)
    cell = kept.rows[3][1][4]
    assert cell.shade == pytest.approx(target["keep"])
    assert cell.small == f"r {target['rank']}"
    assert target["path"] in cell.detail
    assert error.rows[3][1][4].text == f"{target['error']:.3f}".removeprefix("0")
    assert max(cell.shade for _, row in error.rows for cell in row) == 1.0


def test_experts_of_a_block_share_a_cell():
    twins_of = [{**report_sample.target("up", 0), "id": str(i)} for i in range(4)]
    for i, target in enumerate(twins_of):
        target["keep"] = 0.2 * (i + 1)
    (_, row), *_ = maps(twins_of)[0].rows
    assert row[0].text == "50"
    assert row[0].detail.startswith("4 targets such as model.layers.0.mlp.up_proj")


def test_shares_sum_to_the_whole():
    bars = shares(parse(report_sample.report()))
    assert [bar.length for bar in bars] == sorted((bar.length for bar in bars), reverse=True)
    assert sum(float(bar.percent.removesuffix(" %")) for bar in bars) == pytest.approx(100, abs=0.5)
    assert max(bar.before for bar in bars) == 1.0


def test_the_cut_lies_on_the_spectrum():
    target = report_sample.target("o", 2)
    curve = spectrum(target)
    x, y = curve.cut
    assert x == pytest.approx(target["rank"] / 256)
    above = min(v for at, v in zip(curve.xs, curve.ys) if at <= x)
    below = max(v for at, v in zip(curve.xs, curve.ys) if at >= x)
    assert below <= y <= above
    assert spectrum({**target, "rank": None}).cut is None
    assert spectrum({**target, "spectrum": [1.0]}) is None


def test_a_curve_needs_two_points():
    rows = report_sample.rows()
    assert tradeoff(rows[:1], 960, 420) is None
    assert tradeoff(rows[:2], 960, 420) is not None


def test_a_broken_result_does_not_squeeze_the_others():
    broken = report_sample.row("svd 0.4", "svd", "result", 0.4, 5.0, 1.2e7)
    _, points = points_of([*report_sample.rows(), broken])
    assert points[-1].over
    assert points[-1].y == pytest.approx(8 * 8.12)
    assert points[-1].label == "svd 0.4: 1.2e+07 ↑"
    assert not any(point.over for point in points[:-1])


def test_the_curve_of_a_figure_of_ones_own():
    """Without a perplexity the loss is drawn, else the first figure; its name is never a label."""
    name = "<i>$auc$</i>"
    rows = [
        {"name": f"r{n}", "kind": kind, "bytes": size, "metrics": {name: value}}
        for n, (kind, size, value) in enumerate([("dense", 100, 0.9), ("result", 50, -0.1)])
    ]
    assert quality_of(rows).name == name
    _, points = points_of(rows, quality_of(rows))
    assert [point.y for point in points] == [0.9, -0.1]
    assert name not in json.dumps(tradeoff(rows, 960, 420))
    page = Reader(report.html({"schema": "1.1", "model": {}, "rows": rows}))
    assert page.text.count(name) >= 3
    assert "perplexity" not in page.text
    for row, loss in zip(rows, (0.1, 1.2)):
        row["loss"] = loss
    assert quality_of(rows) is LOSS
    assert points_of(rows, LOSS)[1][-1].over


@pytest.mark.parametrize(("low", "high"), [(7, 25), (8.1, 8.5), (1e-4, 1.4), (5, 4e6), (99, 101)])
def test_ticks_are_inside_and_few(low, high):
    ticks = log_ticks(low, high)
    assert 3 <= len(ticks) <= 12
    assert ticks == sorted(ticks)
    assert all(low <= tick <= high for tick in ticks)
    assert Axis(low, high, True).at(high) == 1.0


def test_labels_never_cover_each_other():
    points = [(100 + 12 * (i % 5), 100 + 9 * (i // 5)) for i in range(20)]
    labels = place(points, [f"method {i}" for i in range(20)], 340, 340)
    boxes = []
    for label in labels:
        x, y = points[label.point]
        long = CHARACTER * len(label.text)
        left = x + label.dx - {"left": 0, "center": long / 2, "right": long}[label.align]
        boxes.append((left, y + label.dy - HEIGHT / 2, left + long, y + label.dy + HEIGHT / 2))
    assert labels
    for i, (a, b, c, d) in enumerate(boxes):
        assert a >= 0
        assert c <= 340
        for e, f, g, h in boxes[:i]:
            assert c <= e or g <= a or d <= f or h <= b


def test_every_colour_has_its_own_dark_twin():
    assert len(twins()) == len(COLOURS)


@pytest.mark.process
def test_importing_the_room_is_light():
    code = "import rankine.report, sys; print([m for m in ('torch', 'bokeh') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
