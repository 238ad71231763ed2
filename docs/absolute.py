"""A README that reads on a package index: ``python docs/absolute.py ADDRESS FOLDER``.

Links and pictures of the README in FOLDER, a copy of the repository, become those of ADDRESS, where the
repository is; its pyproject.toml gets the address as well. ``make release`` does so before it builds.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path


def absolute(text: str, address: str, version: str) -> str:
    """Relative links lead to the tag's files, pictures to their bytes."""

    def replace(found: re.Match[str]) -> str:
        picture, label, place = found.groups()
        kind = "raw" if picture else "blob"
        return f"{picture}[{label}]({address}/{kind}/v{version}/{place})"

    return re.sub(r"(!?)\[([^\[\]]*)\]\((?![a-z]+:|#)([^)\s]+)\)", replace, text)


def main(address: str, folder: Path) -> None:
    """Rewrite both files."""
    address = address.rstrip("/")
    project = folder / "pyproject.toml"
    text = project.read_text()
    version = re.findall(r'^version = "(.*)"$', text, re.MULTILINE)[0]
    urls = (
        f'[project.urls]\nSource = "{address}"\nChanges = "{address}/blob/v{version}/CHANGELOG.md"\n\n'
    )
    project.write_text(
        text.replace("[project.optional-dependencies]", f"{urls}[project.optional-dependencies]")
    )
    readme = folder / "README.md"
    readme.write_text(absolute(readme.read_text(), address, version))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
