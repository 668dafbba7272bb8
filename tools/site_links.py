"""A hook of MkDocs: files outside `docs/` that pages link to are part of the site, and links to them lead there.

The pages are written for readers of the repository, where `../SECURITY.md` is a path. On the site the same file lies
at `repository/SECURITY.md`.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
FOLDER = "repository"
"""Where files from outside `docs/` lie on the site."""
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)")
CODE_IN_TABLE = re.compile(r"`[^`\n]*`")
ALWAYS = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "examples/README.md", "benchmarks/RESULTS.md")
"""What the navigation names, whether a page links to it or not."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files outside `docs/` that pages link to, and those that these link to."""
    from mkdocs.structure.files import File, InclusionLevel

    pages = [Path(str(file.abs_src_path)) for file in files.documentation_pages()]
    queue, known = [*pages, *(ROOT / name for name in ALWAYS)], {*pages}
    while queue:
        path = queue.pop()
        if not path.is_relative_to(DOCS) and path not in known:
            known.add(path)
            level = InclusionLevel.NOT_IN_NAV
            files.append(File.generated(config, site_path(path), abs_src_path=str(path), inclusion=level))
        if path.suffix == ".md":
            queue += [target for target in linked_files(path) if target not in known]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Returns the text with links that hold on the site, and pipes in tables as MkDocs reads them."""
    source = Path(str(page.file.abs_src_path))
    lines = (_unescape_pipes(line) if line.startswith("|") else line for line in markdown.split("\n"))
    return LINK.sub(lambda match: _site_link(source, match[1]), "\n".join(lines))


def linked_files(path: Path) -> Iterator[Path]:
    """Yields the files of the repository that a page links to."""
    for target in LINK.findall(path.read_text(encoding="utf-8")):
        file = Path(os.path.normpath(path.parent / target))
        if file.is_file() and file.is_relative_to(ROOT):
            yield file


def site_path(path: Path) -> str:
    """Returns the path of a file of the repository on the site."""
    return (
        path.relative_to(DOCS).as_posix()
        if path.is_relative_to(DOCS)
        else f"{FOLDER}/{path.relative_to(ROOT).as_posix()}"
    )


def _site_link(source: Path, target: str) -> str:
    """Returns a link as it is written on the site; one that leads to no file stays, and MkDocs complains."""
    file = Path(os.path.normpath(source.parent / target))
    if not file.is_file() or not file.is_relative_to(ROOT):
        return target
    return posixpath.relpath(site_path(file), posixpath.dirname(site_path(source)))


def _unescape_pipes(line: str) -> str:
    """Returns a row of a table: in code MkDocs takes a pipe as it is, and shows the backslash before it."""
    return CODE_IN_TABLE.sub(lambda match: match[0].replace("\\|", "|"), line)
