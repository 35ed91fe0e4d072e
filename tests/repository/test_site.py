"""The documentation site builds without warnings, its links resolve, and its pages load nothing from elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.helpers.browser import Browser, find_browser
from tests.repository.test_docstrings import PUBLIC

pytest.importorskip("sphinx", reason="the tools of the documentation need Python 3.11")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", f"{folder}/state", "docs"]
    result = subprocess.run([*command, f"{folder}/html"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder / "html"


class Links(HTMLParser):
    """What a page links to and loads, and the anchors that it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.linked: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = {name: value for name, value in attributes if value is not None}
        if "id" in found:
            self.anchors.add(found["id"])
        if tag == "a" and "href" in found:
            self.linked.append(found["href"])
        elif tag in ("img", "link", "script") and (target := found.get("src", found.get("href"))):
            self.loaded.append(target)


def test_every_link_resolves(site: Path) -> None:
    pages = {path: Links(path.read_text()) for path in site.rglob("*.html")}
    assert {path.stem for path in pages} >= {path.stem for path in (ROOT / "docs").rglob("*.md")}
    for path, page in pages.items():
        for link in (*page.linked, *page.loaded):
            parts = urlsplit(link)
            if parts.scheme:
                assert link not in page.loaded, f"{path.name} loads {link}"
                continue
            file = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert file.is_file(), f"{path.name}: {link}"
            if parts.fragment and file in pages:
                assert unquote(parts.fragment) in pages[file].anchors, f"{path.name}: {link}"


def test_every_public_name_has_an_entry(site: Path) -> None:
    documented = {anchor for path in (site / "api").glob("*.html") for anchor in Links(path.read_text()).anchors}
    assert [name for name in PUBLIC if name not in documented] == []


@pytest.mark.browser
def test_pages_load_without_errors(site: Path) -> None:
    assert find_browser() is not None
    with Browser() as browser:
        for name in ("index", "start", "monitor", "api/monitor"):
            browser.open(site / f"{name}.html", ready="document.readyState === 'complete'")
            assert browser.problems == []
            assert [url for url in browser.requests if not url.startswith(("data:", "file:"))] == []
            if folder := os.environ.get("FASTFS_SCREENSHOTS"):
                browser.screenshot(Path(folder, f"site-{name.replace('/', '-')}.png"))
