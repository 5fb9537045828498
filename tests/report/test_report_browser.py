"""The page in a real browser: it draws, asks the network for nothing, and logs no error."""

import json
import re
import shutil
import subprocess
from html import unescape

import pytest
import report_sample

from rankine import report

CHROMIUM = next(
    (
        found
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (found := shutil.which(name))
    ),
    None,
)
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--enable-logging=stderr", "--virtual-time-budget=10000", "--window-size=390,844"),
    "--host-resolver-rules=MAP * ~NOTFOUND",
)
ATTACK = "</script><script>document.title='taken'</script><img src=x onerror=alert(1)>$$x^2$$"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.process,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium in PATH"),
]


def browse(page, profile):
    """Open a file: its document afterwards, what its console said, and what it asked for."""
    log = profile / "net.json"
    done = subprocess.run(
        [
            *(CHROMIUM, *QUIET, f"--user-data-dir={profile}"),
            *(f"--log-net-log={log}", "--dump-dom", page.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    events = json.loads(log.read_text(encoding="utf-8"))["events"]
    asked = [event.get("params", {}) for event in events]
    # The browser's own housekeeping is "not an origin"; a local file's origin is "null".
    return done.stdout, said, {p["url"] for p in asked if p.get("initiator") == "null"}


def test_the_page_in_a_browser(tmp_path):
    data = report_sample.short()
    for entry in (*data["rows"], *data["targets"]):
        texts = [key for key in ("name", "id", "role", "path") if key in entry]
        entry.update({key: entry[key] + ATTACK for key in texts})
    data["samples"] = [{"prompt": ATTACK, "before": ATTACK, "after": None}]
    report.write(data, tmp_path)
    page, said, asked = browse(tmp_path / "report.html", tmp_path)
    assert f"<title>{data['model']['name']} · Rankine report</title>" in page
    assert page.count("bk-Figure") == 2  # the trade-off curve and one group of spectra
    assert ATTACK in unescape(page)
    assert [line for line in said if not re.search("bokeh.*log level", line)] == []
    assert asked == set()


def test_a_page_that_asks_would_be_caught(tmp_path):
    page = tmp_path / "leak.html"
    page.write_text("<script>fetch('http://leak.invalid/x'); missing()</script>", encoding="utf-8")
    _, said, asked = browse(page, tmp_path)
    assert asked == {"http://leak.invalid/x"}
    assert any("missing is not defined" in line for line in said)
