"""A real Chromium for tests, driven over chromedriver; it can reach this machine and nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-default-apps"),
    *("--force-device-scale-factor=1", "--force-prefers-reduced-motion", "--hide-scrollbars"),
)


@contextmanager
def running_chromium(folder: Path, width: int = 1440, height: int = 900) -> Iterator[webdriver.Chrome]:
    """A browser with an empty profile in `folder`; every request is logged (`requested_urls`)."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not browser or not driver:
        pytest.skip("Chromium is not installed: make setup-servers (Debian packages chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*FLAGS, f"--user-data-dir={folder / 'profile'}", f"--window-size={width},{height}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=Service(driver, log_output=str(folder / "chromedriver.log")))
    try:
        chrome.set_script_timeout(20)
        yield chrome
    finally:
        chrome.quit()


def requested(chrome: webdriver.Chrome) -> list[dict[str, Any]]:
    """The requests since the last call: `url`, `method`, `headers` and `postData` as far as Chromium tells them."""
    messages = [json.loads(entry["message"])["message"] for entry in chrome.get_log("performance")]
    return [message["params"]["request"] for message in messages if message["method"] == "Network.requestWillBeSent"]


def complaints(chrome: webdriver.Chrome) -> list[str]:
    """What the console has said since the last call: script errors and what the page's policy has blocked."""
    return [entry["message"] for entry in chrome.get_log("browser") if entry["level"] == "SEVERE"]
