"""A hook of mkdocs.yml: pages whose text lies outside docs/, and links to files outside docs/.

Links are written for a reader of the repository, relative to the file that they stand in. On the
site a link to a page leads to the page, and one to any other file to a copy of it, as plain text;
notebooks keep their name, to be downloaded.
"""

import os
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

PAGES = {
    "benchmarks/results/README.md": "results.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "README.md": "index.md",
}
"""Which page of the site a file of the repository is, or what stands in its place."""

COPIES = "files"
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages, and what all pages link to."""
    root = _root(config)
    for source, page in PAGES.items():
        if page != "index.md":
            files.append(File.generated(config, page, abs_src_path=str(root / source)))
    texts = {file.src_uri: Path(file.abs_src_path) for file in files.documentation_pages()}
    for path in texts.values():
        for target in _outside(path, config):
            content = (root / target).read_text()
            if files.get_file_from_path(_copy(target)) is None:
                files.append(File.generated(config, _copy(target), content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: object) -> str:
    """Turn links between files of the repository into links between pages."""
    if page.parent is None:  # a tab of one page
        page.meta.setdefault("hide", ["navigation"])
    root, source = _root(config), Path(page.file.abs_src_path)
    here = posixpath.dirname(page.file.src_uri)

    def turn(link: re.Match) -> str:
        target = _target(source, link[2], root)
        if target is None:
            return link[0]
        uri = PAGES.get(target)
        if uri is None:
            uri = target.removeprefix("docs/") if target.startswith("docs/") else _copy(target)
        return f"{link[1]}{posixpath.relpath(uri, here or '.')}{link[3] or ''}{link[4]}"

    return LINK.sub(turn, markdown)


def _root(config: MkDocsConfig) -> Path:
    return Path(config.config_file_path).resolve().parent


def _outside(path: Path, config: MkDocsConfig) -> list[str]:
    """Files that a text links to and that are no pages."""
    root = _root(config)
    found = (_target(path, link[2], root) for link in LINK.finditer(path.read_text()))
    return sorted({t for t in found if t and not t.startswith("docs/") and t not in PAGES})


def _target(source: Path, link: str, root: Path) -> str | None:
    """The file of the repository that a link means, relative to its root.

    Raises:
        PluginError: there is no such file.
    """
    if "://" in link or link.startswith("mailto:"):
        return None
    path = Path(os.path.normpath(source.parent / link))
    if not path.is_file():
        raise PluginError(f"{source}: links to {link}, which is no file")
    return path.relative_to(root).as_posix()


def _copy(target: str) -> str:
    return f"{COPIES}/{target}" if target.endswith(".ipynb") else f"{COPIES}/{target}.txt"
