"""The report in a browser: on a screen and on a telephone, light and dark, and printed.

``CHROMIUM`` names the browser to run; by default it is the one that playwright has installed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from backpack.cockpit.instruments import panels
from backpack.cockpit.report import write
from tests.cockpit.test_report import finished

pytestmark = [pytest.mark.browser, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

# Sizes of all texts as they are seen, and their contrast with what is behind them.
TEXTS = """() => {
  const light = c => c.map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((s, v, k) => s + v * [0.2126, 0.7152, 0.0722][k], 0);
  const rgba = c => (c.match(/[\\d.]+/g) || []).map(Number);
  const behind = e => {
    for (let n = e; n; n = n.parentElement) {
      const c = rgba(getComputedStyle(n).backgroundColor);
      if (c.length === 3 || c[3] > 0.99) return c.slice(0, 3);
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const e of document.querySelectorAll('main *')) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    const box = e.getBoundingClientRect();
    if (!own || !box.width || e.tagName === 'title') continue;
    const style = getComputedStyle(e), svg = e.ownerSVGElement;
    const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
    const [a, b] = [rgba(svg ? style.fill : style.color), behind(e)].map(c => light(c.slice(0, 3)));
    found.push({
      text: e.textContent.trim().slice(0, 30),
      size: parseFloat(style.fontSize) * scale,
      contrast: (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05),
      svg: !!svg,
    });
  }
  return found;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(
            executable_path=os.environ.get("CHROMIUM") or None, args=["--no-sandbox", "--disable-gpu"]
        )
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(finished(), tmp_path_factory.mktemp("report") / "run.html")


@pytest.mark.parametrize("width", [1400, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_report(browser: Any, report: Path, width: int, scheme: str) -> None:
    """No message, nothing fetched, every instrument drawn, and all of it legible."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    messages: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(report.as_uri())
    assert messages == [] and requests == [report.as_uri()]
    figures = page.locator("figure")
    assert figures.count() == len(panels(finished()))
    for k in range(figures.count()):
        box = figures.nth(k).locator("svg").bounding_box()
        assert box["width"] > 200 and box["height"] > 50
        assert box["x"] >= 0 and box["x"] + box["width"] <= width
    # Nothing is wider than the window.
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    texts = page.evaluate(TEXTS)
    assert len(texts) > 100
    small = [each for each in texts if each["size"] < 9]
    pale = [each for each in texts if each["contrast"] < 3]
    assert small == [] and pale == []
    page.close()


def test_print(browser: Any, report: Path) -> None:
    page = browser.new_page()
    page.goto(report.as_uri())
    printed = page.pdf(format="A4")
    assert printed.startswith(b"%PDF") and 1 <= printed.count(b"/Type /Page\n") <= 20
    page.close()
