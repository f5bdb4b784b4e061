"""The documentation builds without a warning, needs no network, and fits a desk and a phone."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import browser
from test_reference import described

DOCS = Path(__file__).parent.parent / "docs"

if os.environ.get("MOEJAX_REQUIRE_BROWSER") != "1":
    for package in ("sphinx", "myst_nb", "furo"):
        pytest.importorskip(package, reason="needs pip install -e '.[docs]'")
    if browser.installed() is None:
        pytest.skip("Chromium is not installed", allow_module_level=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", DOCS, folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    every = (path.relative_to(site) for path in site.rglob("*.html"))
    return sorted(str(path) for path in every if not path.parts[0].startswith("_"))


@pytest.fixture(scope="module")
def report(site, pages, tmp_path_factory):
    assert browser.installed(), f"install one of {browser.NAMES}"
    return browser.inspect(site, pages, tmp_path_factory.mktemp("profile"), search="top_k")


def test_nothing_comes_from_another_server(site, pages):
    source = re.compile(r'<(?:script|link|img|iframe)\b[^>]*"(https?:[^"]+)"')
    for page in pages:
        loaded = source.findall((site / page).read_text())
        assert not loaded, f"{page} loads {loaded}"


def test_every_public_name_is_two_clicks_away(site, pages):
    contents = (site / "index.html").read_text()
    first = [page for page in pages if f'class="reference internal" href="{page}"' in contents]
    beside = [(site / page).read_text().split('class="toc-tree"')[-1] for page in first]
    second = {name for text in beside for name in re.findall(r'href="#([\w.]+)"', text)}
    assert set(described()) <= second


def test_nothing_is_wider_than_its_window(report, pages):
    assert len(report["looks"]) == 4 * len(pages)  # two widths, by day and by night
    wide = [(look["page"], look["width"], look["wide"]) for look in report["looks"] if look["wide"]]
    assert not wide


def test_pictures_and_formulas_are_there(report):
    assert not [look["broken"] for look in report["looks"] if look["broken"]]
    shown = {look["page"]: look for look in report["looks"]}
    assert shown["speed.html"]["pictures"] >= 2
    for page in ("index.html", "rules.html", "reference/rules.html", "reference/losses.html"):
        assert shown[page]["formulas"] >= 1, f"{page} shows no formula"


def test_the_night_is_dark(report):
    for look in report["looks"]:
        brightness = sum(map(int, re.findall(r"\d+", look["ground"])[:3])) / 3
        assert (brightness < 80) == (look["theme"] == "dark"), look


def test_the_search_box_finds_top_k(report):
    assert any("reference/rules.html#moejax.top_k" in link for link in report["found"])
