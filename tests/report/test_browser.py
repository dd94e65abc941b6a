"""The pages in a real browser: nothing fails, nothing is requested, and they fit a phone.

One start of Chromium for all: the pages stand in frames of a page of their own, each with a script that
says on the console how wide it is and what it drew.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("altair")
pytest.importorskip("vl_convert")

from bilevel.report.estimators import check_page, compare_page
from bilevel.report.page import render as one_page
from bilevel.report.several import render as many_page
from tests.report.documents import checked, compared
from tests.report.records import PIXEL, write

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
WIDTHS = (400, 1100)
PROBE = """<script>
addEventListener("load", () => setTimeout(() => {
  const root = document.documentElement;
  const seen = {name: "NAME", width: innerWidth, needed: root.scrollWidth,
    charts: document.querySelectorAll("[id^=chart]").length,
    drawn: document.querySelectorAll("[id^=chart] svg.marks").length,
    unlabelled: [...document.querySelectorAll("button, input")]
      .filter(each => !(each.textContent || each.labels?.length)).length,
    unreachable: [...document.querySelectorAll("button, input, summary, .scroll, a[href]")]
      .filter(each => each.tabIndex < 0).length,
    sorted: ["accuracy", "arm"].flatMap(head => [1, 2].map(() => {
      const chosen = [...document.querySelectorAll("button.sort")].find(each => each.textContent === head);
      chosen?.click();
      return [...(chosen?.closest("table").tBodies[0].rows ?? [])].map(row => row.cells[0].textContent);
    })),
    dark: getComputedStyle(document.body).backgroundColor};
  console.log("SEEN " + JSON.stringify(seen));
}, 1500));
</script>"""
BROKEN = """<!doctype html><body><div style="width: 900px">wide</div>
<img src="http://127.0.0.1:9/picture.png"><script>no_such_function()</script></body>"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("pages")
    measures = {"a measure with a long name": (0.1, 0.5)}
    runs = [
        write(folder, f"toy/{n}", [1.0, 0.5, 1e-4], seed=n, measures=measures, warned="do this")
        for n in range(2)
    ]
    runs.append(write(folder, "toy/u", [2.0, 1.5], estimator="unroll"))
    runs[0].figures.mkdir()
    (runs[0].figures / "gap.png").write_bytes(PIXEL)
    sortable = [
        write(folder, f"other/{lr}", [1.0], settings={"upper.optimizer.lr": lr}, measures=measures)
        for lr, measures in (
            (1, {"accuracy": (0.1, 2000.0)}),
            (2, {"accuracy": (0.1, -0.5)}),
            (3, None),
            (4, {"accuracy": (0.1, 30.0)}),
        )
    ]
    return {
        "one": one_page(runs[0]),
        "many": many_page(runs, "toy", "bilevel report toy -o toy.html " + "x" * 200),
        "sortable": many_page(sortable, "other", "bilevel report other -o other.html"),
        "compare": compare_page(compared(), folder / "none.png"),
        "check": check_page(checked()),
    }


@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip(f"none of {', '.join(NAMES)} is installed")

    def look(pages: dict[str, str], *options: str) -> tuple[list[dict], str, list[str]]:
        """(what each page says of itself at each width, the console, what was requested)"""
        folder: Path = tmp_path_factory.mktemp("browser")
        frames = ""
        for name, html in pages.items():
            before, _, after = html.rpartition("</body>")  # scripts hold others in their texts
            text = before + PROBE.replace("NAME", name) + after
            (folder / f"{name}.html").write_text(text, encoding="utf-8")
            frames += "".join(
                f'<iframe src="{name}.html" style="width: {width}px; height: 900px"></iframe>'
                for width in WIDTHS
            )
        (folder / "index.html").write_text(f"<!doctype html><body>{frames}</body>")
        command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        command += ["--disable-background-networking", "--disable-component-update", "--mute-audio"]
        command += ["--window-size=1200,900", "--virtual-time-budget=6000", "--dump-dom"]
        command += ["--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}", *options]
        command += [f"--log-net-log={folder / 'net.json'}", (folder / "index.html").as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        said = re.findall(r'CONSOLE[^"]*"(.*)", source:', done.stderr)
        seen = [json.loads(line.removeprefix("SEEN ")) for line in said if line.startswith("SEEN ")]
        log = (folder / "net.json").read_text(errors="replace").splitlines()
        # what the browser asks for itself (updates, dictionaries) has no origin
        ours = [line for line in log if '"initiator":"' in line and "not an origin" not in line]
        urls = [url for line in ours for url in re.findall(r'"url":"(.*?)"', line)]
        outside = [url for url in urls if url.startswith(("http:", "https:", "ws"))]
        others = [line for line in said if not line.startswith("SEEN ")]
        return seen, "\n".join(others), outside

    return look


@pytest.fixture(scope="module")
def found(pages, browse):
    """All pages, looked at once."""
    return browse(pages)


def test_nothing_fails_nothing_is_requested_and_all_fits(pages, found):
    seen, console, requested = found
    assert {(each["name"], each["width"]) for each in seen} == {
        (name, width) for name in pages for width in WIDTHS
    }
    assert console == ""
    assert requested == []
    for each in seen:
        assert each["needed"] <= each["width"], each
        assert each["drawn"] == each["charts"] > 0, each
        assert each["unlabelled"] == each["unreachable"] == 0, each


def test_a_page_with_all_these_faults_is_found(browse):  # negative control
    seen, console, requested = browse({"broken": BROKEN})
    assert any(each["needed"] > each["width"] for each in seen)
    assert "no_such_function is not defined" in console
    assert any("127.0.0.1:9" in url for url in requested)


def test_tables_are_sorted_by_their_heads(found):
    """Up, then down; what is not there comes last, either way."""
    (one, two) = (each["sorted"] for each in found[0] if each["name"] == "sortable")
    assert one == two
    assert ["".join(name[-1] for name in order) for order in one] == [
        *("2413", "1423"),  # by accuracy
        *("1234", "4321"),  # by arm
    ]


def test_it_is_dark_where_the_screen_is(pages, found, browse):
    dark, _, _ = browse({"check": pages["check"]}, "--force-dark-mode")

    def brightest(seen) -> int:
        return max(sum(map(int, re.findall(r"\d+", each["dark"])[:3])) for each in seen)

    assert brightest(dark) < 100 < 700 < brightest(found[0])
