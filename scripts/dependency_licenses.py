"""Write the table of dependencies and their licences in THIRD_PARTY_LICENSES.md.

    python -m scripts.dependency_licenses

The packages are the direct dependencies in pyproject.toml, of fastfs and of its extras for users; the licences are what
the metadata of the installed packages says. The row of a package that is not installed is kept.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, metadata

from packaging.requirements import Requirement

from scripts.pyproject import ROOT, read_pyproject

DOCUMENT = ROOT / "THIRD_PARTY_LICENSES.md"
HEAD = "| package | needed for | licence |\n|---|---|---|\n"
# Extras for the development of fastfs, whose packages are tools.
NOT_FOR_USERS = ("dev", "docs", "test")


def direct_dependencies() -> dict[str, list[str]]:
    """Return what each package is needed for: fastfs, or extras."""
    project = read_pyproject()["project"]
    extras = {name: words for name, words in project["optional-dependencies"].items() if name not in NOT_FOR_USERS}
    found: dict[str, list[str]] = {}
    for purpose, words in {"fastfs": project["dependencies"], **extras}.items():
        for requirement in map(Requirement, words):
            if requirement.name != "fastfs":
                found.setdefault(requirement.name, []).append(purpose)
    return found


def licence_of(package: str) -> str | None:
    """Return the licence in the metadata of a package: an expression, else classifiers, else a name; None without it.

    Raises:
      ValueError: the package is installed, and its metadata has none of them.
    """
    try:
        about = metadata(package)
    except PackageNotFoundError:
        return None
    if expressions := about.get_all("License-Expression"):
        return str(expressions[0])
    classifiers = [text for text in about.get_all("Classifier", []) if text.startswith("License ::")]
    if classifiers:
        return ", ".join(text.rpartition(" :: ")[2] for text in classifiers)
    name = str(about.get_all("License", [""])[0])
    if not name or "\n" in name:
        raise ValueError(f"the metadata of {package} names no licence")
    return name


def rows_of(text: str) -> dict[str, str]:
    """Return the licences in the table of a document, by package."""
    return dict(re.findall(r"^\| ([\w.-]+) \| [^|]+ \| ([^|]+) \|$", text.partition(HEAD)[2], re.MULTILINE))


def with_table(text: str) -> str:
    """Return the document with a table that is up to date.

    Raises:
      ValueError: a package is neither installed nor in the table.
    """
    before, head, after = text.partition(HEAD)
    if not head:
        raise ValueError(f"{DOCUMENT.name} has no table with the head {HEAD!r}")
    known = rows_of(text)
    lines = []
    for package, purposes in direct_dependencies().items():
        licence = licence_of(package) or known.get(package)
        if licence is None:
            raise ValueError(f"{package} is not installed, and {DOCUMENT.name} has no row for it")
        lines.append(f"| {package} | {', '.join(purposes)} | {licence} |\n")
    return before + head + "".join(lines) + re.sub(r"\A(?:\|.*\n)*", "", after)


def main() -> int:
    DOCUMENT.write_text(with_table(DOCUMENT.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
