"""What a release says of itself: the citation, the licences of others, the changelog's head, the workflows."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, files, version

import pytest
import yaml
from packaging.requirements import Requirement

from fastfs._version import __version__
from scripts import dependency_licenses as licences
from scripts.pyproject import ROOT, read_pyproject

PROJECT = read_pyproject()["project"]


def test_citation_has_this_library_and_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software"
    assert citation["message"]
    assert citation["title"].startswith("fastfs")
    assert citation["license"] == PROJECT["license"]
    assert [set(author) for author in citation["authors"]] == [{"name"}]
    assert "version" not in citation  # it is in fastfs/_version.py and nowhere else
    (paper,) = citation["references"]
    assert paper["title"].startswith("The Feature Speed Formula: ")
    assert [author["family-names"] for author in paper["authors"]] == ["Chizat", "Netrapalli"]
    (identifier,) = paper["identifiers"]
    number = identifier["value"].removeprefix("arXiv:")
    assert paper["url"].endswith(f"/{number}")
    assert f"[arXiv {number}]" in (ROOT / "README.md").read_text()


def newest_pins() -> dict[str, str]:
    pins = map(Requirement, re.findall(r"^\w.*$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    newest = [pin for pin in pins if pin.marker is None or pin.marker.evaluate({"python_version": "3.13"})]
    return {pin.name.lower(): str(pin.specifier).removeprefix("==") for pin in newest}


def test_table_of_licences_has_the_direct_dependencies() -> None:
    rows = licences.rows_of(licences.DOCUMENT.read_text())
    assert list(rows) == list(licences.direct_dependencies())
    assert {"torch", "numpy", "plotly", "trackio"} <= rows.keys()
    assert "pytest" not in rows


def test_table_of_licences_is_what_the_metadata_says() -> None:
    pins, compared = newest_pins(), 0
    for package, licence in licences.rows_of(licences.DOCUMENT.read_text()).items():
        try:
            installed = version(package).partition("+")[0]
        except PackageNotFoundError:
            continue
        if installed == pins.get(package):  # other releases may say it in other words
            assert licence == licences.licence_of(package), package
            compared += 1
    assert compared >= 1


def test_table_of_licences_keeps_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    text = licences.DOCUMENT.read_text()
    monkeypatch.setattr(
        licences, "direct_dependencies", lambda: {"no-such-package": ["extra"], "packaging": ["fastfs"]}
    )
    with pytest.raises(ValueError, match="no-such-package is not installed"):
        licences.with_table(text)
    before, head, _ = text.partition(licences.HEAD)
    written = licences.with_table(f"{before}{head}| no-such-package | nothing | Its own |\n\nAfter.\n")
    assert written.startswith(f"{before}{head}| no-such-package | extra | Its own |\n| packaging | fastfs | Apache")
    assert written.endswith("|\n\nAfter.\n")


def test_notices_of_what_is_compiled_in_are_in_the_wheel() -> None:
    document = licences.DOCUMENT.read_text()
    assert PROJECT["license-files"] == ["LICENSE", licences.DOCUMENT.name, "licenses/*"]
    for path in (ROOT / "licenses").iterdir():
        assert f"`licenses/{path.name}`" in document
    (notice,) = [file for file in files("pybind11") or [] if file.name == "LICENSE"]
    assert (ROOT / "licenses" / "pybind11.txt").read_text() == notice.read_text()


def test_changelog_begins_with_what_is_not_released_or_with_this_version() -> None:
    heads = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    released = [re.fullmatch(r"(\d+\.\d+\.\d+) \(\d{4}-\d\d-\d\d\)", head) for head in heads if head != "Unreleased"]
    assert all(released)
    assert heads.index("Unreleased") == 0 if "Unreleased" in heads else released[0][1] == __version__
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", __version__)


def test_workflows_test_and_build_for_the_same_versions_of_python() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    tested = workflow["jobs"]["test"]["strategy"]["matrix"]["python"]
    build = read_pyproject()["tool"]["cibuildwheel"]["build"]
    assert build == f"cp{{{','.join(version.replace('.', '') for version in tested)}}}-manylinux_*"
    assert PROJECT["requires-python"] == f">={tested[0]}"
