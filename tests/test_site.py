"""The documentation site: it builds without a warning and loads nothing from other hosts."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, as `mkdocs build --strict` makes it: a broken link or anchor is an error."""
    folder = tmp_path_factory.mktemp("site")
    config = load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(folder))
    config.plugins.on_startup(command="build", dirty=False)
    build(config)
    return folder


class Loaded(HTMLParser):
    """What a browser fetches to show a page."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in ("script", "img", "iframe", "source") and values.get("src"):
            self.found.append(values["src"])
        fetched = {"stylesheet", "icon", "preconnect", "preload", "dns-prefetch"}
        if tag == "link" and fetched & set((values.get("rel") or "").split()):
            self.found.append(values["href"])


def test_every_page_of_the_documents_is_there(site):
    pages = {page.relative_to(ROOT / "docs").with_suffix("") for page in ROOT.glob("docs/**/*.md")}
    assert len(pages) > 25
    for page in pages:
        name = page.parent if page.name == "index" else page
        assert (site / name / "index.html").is_file(), page


def test_nothing_is_loaded_from_another_host(site):
    pages = list(site.rglob("*.html"))
    for page in pages:
        for address in Loaded(page.read_text()).found:
            assert "//" not in address, (page, address)
    styles = [path.read_text() for path in site.rglob("*.css")]
    assert not re.search(r"(url\(|@import)[\"' ]*(https?:)?//", "".join(styles))


def test_results_and_changelog_are_those_of_the_repository(site):
    for page, heading in (("results", "Layers of other papers"), ("changelog", "0.2.0")):
        assert heading in (site / page / "index.html").read_text()
    assert "What a change has" in (site / "contributing" / "index.html").read_text()


def test_links_out_of_the_documents_lead_to_copies(site):
    copy = site / "files" / "config" / "dit" / "imagenet256.yaml.txt"
    assert copy.read_text() == (ROOT / "config/dit/imagenet256.yaml").read_text()
    page = (site / "how" / "table3" / "index.html").read_text()
    assert 'href="../../files/config/dit/imagenet256.yaml.txt"' in page
    notebook = site / "files" / "notebooks" / "quickstart.ipynb"  # to be downloaded
    assert notebook.read_text() == (ROOT / "notebooks" / "quickstart.ipynb").read_text()


def test_the_search_finds_pages_and_docstrings(site):
    entries = json.loads((site / "search" / "search_index.json").read_text())["docs"]
    places = {entry["location"] for entry in entries}
    assert "api/core/#core.types.RoutingPlan" in places
    assert any(place.startswith("troubleshooting/#") for place in places)
