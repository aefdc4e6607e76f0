"""A real browser for tests of pages: Debian's Chromium, driven by selenium and chromedriver."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

QUIET = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--no-first-run", "--disable-quic", "--disable-extensions", "--no-default-browser-check"),
)

CUT = """
const width = document.documentElement.clientWidth, found = [];
const scrolls = (node) => {
  for (let up = node; up && up !== document.body; up = up.parentElement)
    if (["auto", "scroll"].includes(getComputedStyle(up).overflowX)) return true;
  return false;
};
const clip = (node) => {
  let left = 0, right = width;
  for (let up = node; up && up !== document.body; up = up.parentElement)
    if (getComputedStyle(up).overflowX === "hidden") {
      const box = up.getBoundingClientRect();
      left = Math.max(left, box.left); right = Math.min(right, box.right);
    }
  return [left, right];
};
const name = (node) => node.tagName + "." + (node.getAttribute("class") || "") + ": "
  + node.textContent.trim().slice(0, 40);
if (document.documentElement.scrollWidth > width) found.push("the page is wider than the window");
for (const node of document.body.querySelectorAll("*")) {
  if (node.closest("script, style, svg, title")) continue;
  const look = getComputedStyle(node);
  if (look.display === "inline" || look.display === "none" || !node.clientWidth) continue;
  if (node.scrollWidth > node.clientWidth && !["auto", "scroll"].includes(look.overflowX))
    found.push("overflows " + name(node));
}
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
for (let node; (node = walker.nextNode()); ) {
  const up = node.parentElement;
  if (!node.data.trim() || up.closest("script, style, title")) continue;
  const drawing = up.closest("svg");
  const range = document.createRange();
  range.selectNodeContents(node);
  for (const box of drawing ? [up.getBoundingClientRect()] : range.getClientRects()) {
    if (!box.width) continue;
    if (drawing) {
      const whole = drawing.getBoundingClientRect();
      if (box.left < whole.left - 1 || box.right > whole.right + 1 || box.top < whole.top - 1
          || box.bottom > whole.bottom + 1) found.push("outside its drawing " + name(up));
    }
    if (scrolls(up)) continue;
    const [left, right] = clip(up);
    if (box.left < left - 0.5 || box.right > right + 0.5) found.push("outside " + name(up));
  }
}
return found;
"""
"""Lists what is cut: boxes that overflow without a scroll bar, words outside window or drawing."""

OVERLAPS = """
const found = [];
for (const drawing of document.querySelectorAll("svg")) {
  const texts = [...drawing.querySelectorAll("text")].filter((one) => one.textContent.trim());
  const boxes = texts.map((one) => one.getBoundingClientRect());
  for (let i = 0; i < boxes.length; i++)
    for (let j = 0; j < i; j++) {
      const a = boxes[i], b = boxes[j];
      const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (wide > 3 && high > 3) found.push(texts[i].textContent + " over " + texts[j].textContent);
    }
}
return found;
"""
"""Lists words of drawings that cover each other by more than their line height's slack."""

SMALLEST = """
return Math.min(...[...document.querySelectorAll("svg text")].map((one) =>
  Number.parseFloat(getComputedStyle(one).fontSize) * one.ownerSVGElement.getScreenCTM().a));
"""
"""Size of the smallest words of all drawings, in pixels of the screen."""


class Browser:
    """One window, resized and re-styled from test to test.

    Parameters
    ----------
    driver : selenium.webdriver.Chrome
    """

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def show(
        self, page: Path, *, width: int = 1280, scheme: str = "light", media: str = "screen"
    ) -> None:
        """Load a page in a window of some width, with all its details open."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        look = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"media": media, "features": look}
        )
        self.driver.get(page.as_uri())
        self.run("for (const one of document.querySelectorAll('details')) one.open = true")

    def run(self, script: str, *arguments: Any) -> Any:
        """Run JavaScript in the page and return what it returns."""
        return self.driver.execute_script(script, *arguments)

    def find(self, selector: str) -> list[Any]:
        """Return the elements that a CSS selector means."""
        return list(self.driver.find_elements("css selector", selector))

    def texts(self, selector: str) -> list[str]:
        """Return the words of elements that are shown."""
        return list(
            self.run(
                "return [...document.querySelectorAll(arguments[0])]"
                ".filter((one) => one.checkVisibility()).map((one) => one.innerText.trim())",
                selector,
            )
        )

    def style(self, selector: str, name: str) -> str:
        """Return a computed style of the first element that a selector means."""
        return str(
            self.run(
                "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]",
                selector,
                name,
            )
        )


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """Start the browser; skip where it, its driver or selenium is not installed."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        pytest.skip("no chromium with chromedriver: apt-get install chromium chromium-driver")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(programs[0])
    for flag in (*QUIET, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service(str(programs[1])))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
