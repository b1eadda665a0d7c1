"""What tests do with the reader page, and what they see of it."""

from __future__ import annotations

import base64
import os
from pathlib import Path

import numpy as np
from dicom_nodes import until
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

PIXELS = """
const c = document.getElementById('canvas'), d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
let text = '';
for (let i = 0; i < d.length; i += 4) text += String.fromCharCode(d[i], d[i + 1], d[i + 2]);
return [c.width, c.height, btoa(text)];
"""
HEAT = """
const [grid, frame, done] = arguments;
import('./page/heat.js').then(({heatOf}) => done([...heatOf(grid, frame, 200, 200, 200, 200)]));
"""
CONTRAST = """
const channel = (v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4);
const light = (c) => 0.2126 * channel(c[0]) + 0.7152 * channel(c[1]) + 0.0722 * channel(c[2]);
const parse = (text) => text.match(/[\\d.]+/g).map(Number);
const ground = (node) => {
  for (let at = node; at; at = at.parentElement) {
    const c = parse(getComputedStyle(at).backgroundColor);
    if ((c[3] ?? 1) > 0.9) return c;
  }
  return [0, 0, 0];
};
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
const found = [];
while (walker.nextNode()) {
  const node = walker.currentNode.parentElement;
  if (!walker.currentNode.data.trim() || !node.checkVisibility() || node.closest('.unseen')) continue;
  const [a, b] = [light(parse(getComputedStyle(node).color)), light(ground(node))].sort((x, y) => y - x);
  found.push([(a + 0.05) / (b + 0.05), walker.currentNode.data.trim().slice(0, 40)]);
}
return found;
"""


def find(chrome: Chrome, selector: str) -> WebElement:
    return chrome.find_element(By.CSS_SELECTOR, selector)


def buttons(chrome: Chrome) -> list[WebElement]:
    return chrome.find_elements(By.CSS_SELECTOR, ".sentence")


def upload(chrome: Chrome, path: Path) -> None:
    find(chrome, "#files").send_keys(str(path))
    until(lambda: find(chrome, "#problem").text or buttons(chrome), 60)
    settle(chrome)


def click(chrome: Chrome, target: WebElement) -> None:
    """As a reader does: scrolled away from the banner first."""
    chrome.execute_script("arguments[0].scrollIntoView({block: 'center'})", target)
    target.click()


def settle(chrome: Chrome) -> None:
    """Until what was asked for is drawn."""
    chrome.execute_async_script("const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(() => done()))")


def pixels(chrome: Chrome) -> np.ndarray:
    """[h, w, 3] of the canvas."""
    settle(chrome)
    width, height, text = chrome.execute_script(PIXELS)
    return np.frombuffer(base64.b64decode(text), np.uint8).reshape(height, width, 3)


def colour(image: np.ndarray) -> np.ndarray:
    """[h, w]: how far from grey."""
    return np.ptp(image.astype(int), axis=2)


def picture_of(chrome: Chrome, name: str) -> None:
    """Kept for people to look at where SSACL_PICTURES names a folder."""
    if folder := os.environ.get("SSACL_PICTURES"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        settle(chrome)
        chrome.save_screenshot(str(Path(folder) / f"{name}.png"))
