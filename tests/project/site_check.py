"""The built site, read as files and opened in a browser; run by `make check-site`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

SITE = Path(os.environ.get("SITE", Path(__file__).parents[2] / "docs" / "_build"))
PAGES = sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html"))
SHOWN = [page for page in PAGES if not page.startswith(("_static/", "_modules/"))]


class Reader(HTMLParser):
    """Addresses that a page refers to, its anchors, and its elements."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.addresses: set[str] = set()
        self.anchors: set[str] = set()
        self.tags: list[str] = []
        self.feed((SITE / page).read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for key, value in attrs:
            if key in ("href", "src") and value is not None:
                self.addresses.add(value)
            if key in ("id", "name") and value is not None:
                self.anchors.add(value)


@pytest.fixture(scope="module")
def read() -> dict[str, Reader]:
    return {page: Reader(page) for page in PAGES}


def test_there_is_a_site() -> None:
    assert {"index.html", "search.html", "howto/index.html", "tutorials/index.html"} <= set(PAGES)
    assert len(PAGES) > 60


def test_links(read: dict[str, Reader]) -> None:
    """To files and anchors that are there; what a page loads comes from the site."""
    broken = []
    for page, reader in read.items():
        for address in reader.addresses:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            place = (SITE / page).parent / unquote(parts.path) if parts.path else SITE / page
            other = place.resolve().relative_to(SITE.resolve()).as_posix() if place.exists() else ""
            known = not parts.fragment or other not in read or parts.fragment in read[other].anchors
            if not place.exists() or not known:
                broken.append(f"{page}: {address}")
    assert broken == []


def test_formulas(read: dict[str, Reader]) -> None:
    for page in ("index.html", "howto/laplace.html", "howto/influence.html", "howto/pruning.html"):
        assert "math" in read[page].tags, page


def test_names_lead_to_the_api(read: dict[str, Reader]) -> None:
    assert "api/optim.html#backpack.optim.KFAC" in read["optim.html"].addresses
    assert "api/quantities.html#backpack.extensions.KFAC" in read["quantities.html"].addresses
    assert "../api/quantities.html#backpack.extensions.KFLR" in read["howto/laplace.html"].addresses


def test_every_tutorial_has_a_picture_of_its_own(read: dict[str, Reader]) -> None:
    addresses = {each for each in read["tutorials/index.html"].addresses if "_thumb." in each}
    pictures = [(SITE / "tutorials" / each).read_bytes() for each in addresses]
    assert len(pictures) > 20 and len(set(pictures)) == len(pictures)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    path = os.environ.get("CHROMIUM") or None
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def failed(request: Any) -> bool:
    """Whether there was nothing to load; a picture that the next page came before is no fault."""
    return "ERR_ABORTED" not in (request.failure or "")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_pages(browser: Any, width: int, scheme: str) -> None:
    """No error, nothing from elsewhere, no broken image, nothing wider than the window."""
    wrong: list[str] = []
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.on("console", lambda message: message.type == "error" and wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("requestfailed", lambda request: failed(request) and wrong.append(f"failed {request.url}"))
    page.on("request", lambda request: request.url.startswith("http") and wrong.append(request.url))
    for name in SHOWN:
        page.goto(f"file://{SITE.resolve() / name}")
        broken = page.evaluate(
            "[...document.images].filter(i => i.loading != 'lazy' && !i.naturalWidth).map(i => i.src)"
        )
        wrong += [f"{name}: image {each}" for each in broken]
        element = "document.documentElement"
        beyond = page.evaluate(f"{element}.scrollWidth - {element}.clientWidth")
        if beyond > 0:
            wrong.append(f"{name}: {beyond} pixels too wide")
    page.goto(f"file://{SITE.resolve() / 'index.html'}")
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    red = int(colour.removeprefix("rgb(").split(",")[0])
    assert (red > 128) == (scheme == "light")
    formula = page.locator("math[display=block]").bounding_box()
    assert formula["height"] > 20 and formula["width"] > 200
    page.close()
    assert wrong == []


@pytest.mark.parametrize("word", ["laplace", "influence", "lightning"])
def test_search(browser: Any, word: str) -> None:
    page = browser.new_page()
    page.goto(f"file://{SITE.resolve() / 'search.html'}?q={word}")
    page.wait_for_selector("#search-results li a")
    page.wait_for_timeout(1000)
    found = page.eval_on_selector_all("#search-results li a", "all => all.map(a => a.href)")
    assert any(f"/howto/{word}.html" in each for each in found), found
    page.close()


def test_heads_of_the_support_table_stay(browser: Any) -> None:
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    page.goto(f"file://{SITE.resolve() / 'support.html'}")
    box = page.locator(".table-wrapper:has(table.grid)").first
    box.scroll_into_view_if_needed()
    box.evaluate("each => { each.scrollTop = 600; each.scrollLeft = 100 }")
    head, frame = box.locator("thead th").first.bounding_box(), box.bounding_box()
    assert abs(head["y"] - frame["y"]) < 5 and abs(head["x"] - frame["x"]) < 5
    colours = box.evaluate(
        "each => [...new Set([...each.querySelectorAll('td.is-ok, td.is-runs, td.is-error')]"
        ".map(cell => getComputedStyle(cell).backgroundColor))]"
    )
    assert len(colours) == 3
    page.close()
