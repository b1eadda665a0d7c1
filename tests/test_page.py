"""The reader page in a real Chromium, over the real HTTP interface and a tiny model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
from chromium import complaints, requested, running_chromium
from dicom_files import film
from dicom_nodes import free_port, study_film, until
from reader_page import CONTRAST, HEAT, buttons, click, colour, find, picture_of, pixels, upload
from report_endpoint import InProcess, running_endpoint
from selenium.webdriver import ActionChains, Chrome, Keys
from selenium.webdriver.common.by import By
from tiny_model import tiny_model_folder

from serve.page.routes import PAGE_HEADERS
from serve.problems import OverloadedError
from ssacl.data.dicom import Picture
from ssacl.inference.grounding import understand
from ssacl.inference.maps import map_on_picture
from ssacl.inference.report import Box, DraftReport, Sentence

pytestmark = [pytest.mark.external, pytest.mark.timeout(120)]
STATIC = Path(__file__).parents[1] / "serve" / "page" / "static"
NAME = "PLANTED_NAME.dcm"
SENTENCES = (
    "There is a moderate left pleural effusion with adjacent atelectasis.",
    "The heart is mildly enlarged.",
    "The right lung is clear.",
    "No pneumothorax <b>is</b> seen.",
)


class Dictating(InProcess):
    """The real model, but for its words: a random one writes none. Findings and maps are its own."""

    busy = False

    async def report(self, picture: Picture) -> DraftReport:
        if self.busy:
            raise OverloadedError
        draft = await super().report(picture)
        looked = self.generator.ground(picture, SENTENCES)
        sentences = [
            Sentence(
                text, seen.anatomy, seen.finding, str(understand(text).status.name).lower(), 0.9 - 0.2 * number, seen.box, seen.evidence
            )
            for number, (text, seen) in enumerate(zip(SENTENCES, looked, strict=True))
        ]
        return replace(draft, sentences=tuple(sentences))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Dictating:
    return Dictating(tiny_model_folder(tmp_path_factory.mktemp("model") / "model"))


@pytest.fixture(scope="module")
def site(model: Dictating) -> Iterator[str]:
    port = free_port()
    with running_endpoint(model, port) as url:
        yield url.removesuffix("v1/reports")


@pytest.fixture(scope="module")
def chrome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    with running_chromium(tmp_path_factory.mktemp("chromium")) as running:
        yield running


@pytest.fixture
def page(chrome: Chrome, site: str) -> Iterator[Chrome]:
    chrome.set_window_size(1440, 900)
    chrome.get(site)
    requested(chrome)
    complaints(chrome)
    yield chrome
    assert complaints(chrome) == []


@pytest.fixture
def film_file(tmp_path: Path) -> Path:
    path = tmp_path / NAME
    pixels = film(200)
    path.write_bytes(study_film(1, PixelData=pixels.tobytes(), Rows=200, Columns=200))
    return path


def test_a_film_is_read_and_nothing_of_it_goes_elsewhere(page: Chrome, site: str, film_file: Path, model: Dictating) -> None:
    picture_of(page, "empty")
    before = model.num_reports
    upload(page, film_file)
    assert model.num_reports == before + 1
    assert [button.find_element(By.CLASS_NAME, "text").text for button in buttons(page)] == list(SENTENCES)
    assert "Pleural Effusion: present" in buttons(page)[0].text
    assert "confidence 90 %" in buttons(page)[0].text
    assert len(page.find_elements(By.CSS_SELECTOR, "#findings tr")) == 14
    widths = [bar.size["width"] for bar in page.find_elements(By.CSS_SELECTOR, "#findings .fill")]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > 5 * widths[-1]
    assert find(page, "#model").text == model.generator.model_version
    assert find(page, "#status").text.startswith("Draft ready: 4 sentences")
    image = pixels(page)
    # The film fills the stage's height and is grey: black at the sides, dark lungs, bright mediastinum.
    assert colour(image).max() == 0
    assert image.std() > 20
    sent = requested(page)
    assert len([item for item in sent if item["method"] == "POST"]) == 1
    assert {item["url"][: len(site)] for item in sent if not item["url"].startswith("data:")} == {site}
    assert "PLANTED" not in str(sent)
    stored = page.execute_async_script(
        "const done = arguments[0]; Promise.all([caches.keys().catch(() => []), indexedDB.databases()])"
        ".then(([c, d]) => done([c, d, localStorage.length, sessionStorage.length, document.cookie]))"
    )
    assert stored == [[], [], 0, 0, ""]


def test_evidence_lies_where_the_model_looked(page: Chrome, film_file: Path, model: Dictating, site: str) -> None:
    upload(page, film_file)
    plain = pixels(page)
    ActionChains(page).move_to_element(buttons(page)[0]).perform()
    seen = pixels(page)
    picture_of(page, "evidence")
    assert find(page, "#caption").text == SENTENCES[0]
    answer = httpx.post(
        f"{site}v1/reports", content=film_file.read_bytes(), headers={"content-type": "application/dicom"}, timeout=60
    ).json()
    frame, evidence = Box(**answer["map_frame"]), answer["sentences"][0]["evidence"]
    expected = map_on_picture(evidence, frame, 200, 200, 200, 200)
    drawn = page.execute_async_script(HEAT, evidence, answer["map_frame"])
    np.testing.assert_allclose(np.reshape(drawn, (200, 200)), expected, atol=1e-5)
    # Where the map is high the film is coloured, where it is 0 it is as before.
    side = min(plain.shape[:2])
    left = (plain.shape[1] - side) // 2
    top = (plain.shape[0] - side) // 2
    y, x = np.unravel_index(expected.argmax(), expected.shape)
    assert colour(seen)[top + round((y + 0.5) * side / 200), left + round((x + 0.5) * side / 200)] > 60
    assert colour(seen)[:, : left - 2].max(initial=0) == 0
    ActionChains(page).move_to_element(find(page, "#recent-title")).perform()
    np.testing.assert_array_equal(pixels(page), plain)
    # A click keeps it; another lets it go.
    click(page, buttons(page)[1])
    ActionChains(page).move_to_element(find(page, "#recent-title")).perform()
    assert colour(pixels(page)).max() > 60
    click(page, buttons(page)[1])
    ActionChains(page).move_to_element(find(page, "#recent-title")).perform()
    np.testing.assert_array_equal(pixels(page), plain)


def test_everything_can_be_done_by_keys(page: Chrome, film_file: Path) -> None:
    upload(page, film_file)
    page.execute_script("document.activeElement.blur(); document.body.focus()")
    keys = ActionChains(page)
    path = []
    for _ in range(40):
        keys.send_keys(Keys.TAB).perform()
        now = page.switch_to.active_element
        path.append(now.get_attribute("id") or now.get_attribute("name") or now.get_attribute("class") or now.tag_name)
        outline = now.value_of_css_property("outline-style")
        shown = outline != "none" or path[-1] in ("drag", "files")
        assert shown, f"{path[-1]} has no visible focus"
        if path[-1].startswith("sentence"):
            break
    assert path[:9] == ["drag", "zoom-out", "zoom-in", "invert", "reset", "stage", "width", "level", "strength"]
    assert path[9:11] == ["files", "summary"]
    assert find(page, "#caption").text == SENTENCES[0]
    picture_of(page, "keys")
    keys.send_keys(Keys.ARROW_DOWN).perform()
    assert find(page, "#caption").text == SENTENCES[1]
    assert SENTENCES[1] in find(page, "#canvas").get_attribute("aria-label")
    keys.send_keys(Keys.ENTER).perform()
    assert buttons(page)[1].get_attribute("aria-pressed") == "true"
    stage = find(page, "#stage")
    page.execute_script("arguments[0].focus()", stage)
    assert colour(pixels(page)).max() > 60
    plain = pixels(page)
    keys.send_keys("i").perform()
    assert find(page, "#invert").get_attribute("aria-pressed") == "true"
    keys.send_keys("++", Keys.ARROW_LEFT, "[[").perform()
    assert find(page, "#zoom").text == "156 %"
    assert find(page, "#width").get_attribute("value") == "224"
    keys.send_keys("0").perform()
    np.testing.assert_array_equal(pixels(page), plain)
    page.execute_script("arguments[0].focus()", buttons(page)[1])
    keys.send_keys(Keys.ESCAPE).perform()
    assert colour(pixels(page)).max() == 0


def test_window_level_zoom_and_place(page: Chrome, film_file: Path) -> None:
    upload(page, film_file)
    plain = pixels(page)
    stage = find(page, "#stage")
    ActionChains(page).click_and_hold(stage).move_by_offset(0, 120).release().perform()
    assert float(find(page, "#level").get_attribute("value")) > 150
    darker = pixels(page)
    assert darker.mean() < plain.mean() - 10
    find(page, "#reset").click()
    np.testing.assert_array_equal(pixels(page), plain)
    page.execute_script("const w = document.getElementById('width'); w.value = 64; w.dispatchEvent(new Event('input'))")
    # A narrow window has more of pure black and white.
    assert np.isin(pixels(page), (0, 255)).mean() > np.isin(plain, (0, 255)).mean()
    find(page, "#reset").click()
    find(page, "#invert").click()
    side, left = plain.shape[0], (plain.shape[1] - plain.shape[0]) // 2
    inner = np.s_[10 : side - 10, left + 10 : left + side - 10]
    assert np.abs(255 - pixels(page)[inner].astype(int) - plain[inner]).max() <= 1
    find(page, "#reset").click()
    find(page, "input[value=move]").click()
    ActionChains(page).click_and_hold(stage).move_by_offset(60, 40).release().perform()
    np.testing.assert_array_equal(pixels(page)[60:-20, left + 80 : -left - 20], plain[20:-60, left + 20 : -left - 80])
    ActionChains(page).scroll_by_amount(0, 0).move_to_element(stage).perform()
    page.execute_script(
        "const s = document.getElementById('stage'), r = s.getBoundingClientRect();"
        "s.dispatchEvent(new WheelEvent('wheel', {deltaY: -400, clientX: r.x + 9, clientY: r.y + 9, cancelable: true}))"
    )
    assert int(find(page, "#zoom").text.split()[0]) > 150


def test_a_dropped_film_opens_and_drafts_can_be_opened_again_and_forgotten(page: Chrome, film_file: Path, site: str) -> None:
    upload(page, film_file)
    first = pixels(page)
    page.execute_async_script(
        "const done = arguments[0], t = new DataTransfer(), c = new OffscreenCanvas(300, 260), g = c.getContext('2d');"
        "for (let i = 0; i < 300; i++) { g.fillStyle = `rgb(${i % 256} ${i % 256} ${i % 256})`; g.fillRect(i, 0, 1, 260 - i / 3); }"
        "c.convertToBlob().then((b) => { t.items.add(new File([b], 'PLANTED.png'));"
        "document.getElementById('stage').dispatchEvent(new DragEvent('drop', {dataTransfer: t, bubbles: true})); done(); })"
    )
    drafts = lambda: page.find_elements(By.CSS_SELECTOR, ".draft")  # noqa: E731
    until(lambda: len(drafts()) == 2 or find(page, "#problem").text, 60)
    assert find(page, "#problem").text == ""
    assert np.abs(pixels(page).astype(int) - first).mean() > 5
    drafts()[1].click()
    np.testing.assert_array_equal(pixels(page), first)
    assert drafts()[1].get_attribute("aria-current") == "true"
    assert page.switch_to.active_element == drafts()[1]
    assert "PLANTED" not in page.page_source + str(requested(page))
    find(page, "#forget").click()
    assert (drafts(), buttons(page)) == ([], [])
    assert pixels(page).max() == 0
    assert find(page, "#empty").is_displayed()


def test_errors_tell_the_problem_and_the_next_step(page: Chrome, model: Dictating, tmp_path: Path, film_file: Path) -> None:
    (tmp_path / "letter.txt").write_text("The patient has a cough.")
    find(page, "#files").send_keys(str(tmp_path / "letter.txt"))
    until(lambda: find(page, "#problem").text)
    alert = find(page, "#problem")
    assert alert.get_attribute("role") == "alert"
    assert alert.text.startswith("The image cannot be used\n")
    assert len(alert.text) > 60
    assert "Try again" not in alert.text
    picture_of(page, "problem")
    model.busy = True
    try:
        find(page, "#files").send_keys(str(film_file))
        until(lambda: "busy" in find(page, "#problem").text)
    finally:
        model.busy = False
    find(page, "#problem button").click()
    until(lambda: buttons(page))
    assert find(page, "#problem").text == ""
    # The browser itself tells each refused request; nothing else is wrong.
    assert {re.search(r"status of (\d+)", line)[1] for line in complaints(page)} == {"415", "503"}


def test_an_endpoint_that_is_gone_is_told(chrome: Chrome, model: Dictating, film_file: Path) -> None:
    port = free_port()
    with running_endpoint(model, port) as url:
        chrome.get(url.removesuffix("v1/reports"))
    find(chrome, "#files").send_keys(str(film_file))
    until(lambda: find(chrome, "#problem").text)
    assert "does not answer" in find(chrome, "#problem").text
    assert all("ERR_CONNECTION_REFUSED" in line for line in complaints(chrome))


def test_the_key_is_sent_as_bearer_and_kept_nowhere(page: Chrome, site: str, film_file: Path) -> None:
    find(page, "#access summary").click()
    find(page, "#key").send_keys("sesame", Keys.TAB)
    upload(page, film_file)
    sent = [item["headers"].get("authorization") for item in requested(page) if "/v1/" in item["url"]]
    assert sent == ["Bearer sesame"] * 2
    page.refresh()
    assert find(page, "#key").get_property("value") == ""


def test_a_small_screen_keeps_film_and_sentence_in_sight(page: Chrome, film_file: Path) -> None:
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True})
    page.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    try:
        page.refresh()
        picture_of(page, "small_empty")
        upload(page, film_file)
        assert page.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        page.execute_script("arguments[0].scrollIntoView({block: 'end'})", buttons(page)[3])
        for button in (find(page, ".banner strong"), find(page, "#stage"), buttons(page)[3]):
            box = page.execute_script("const r = arguments[0].getBoundingClientRect(); return [r.top, r.bottom, innerHeight]", button)
            assert -1 <= box[0] < box[1] <= box[2] + 1
        where = page.execute_script("const r = arguments[0].getBoundingClientRect(); return [r.x + 40, r.y + 20]", buttons(page)[3])
        for count in (1, 2):
            points = [{"x": where[0], "y": where[1]}]
            page.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": points})
            page.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
            until(lambda count=count: find(page, "#caption").text == (SENTENCES[3] if count == 1 else ""))
            picture_of(page, f"small_tapped_{count}")
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})


def test_texts_have_contrast_and_controls_have_names(page: Chrome, film_file: Path) -> None:
    upload(page, film_file)
    for summary in page.find_elements(By.CSS_SELECTOR, "details:not([open]) summary"):
        summary.click()
    measured = page.execute_script(CONTRAST)
    assert len(measured) > 60
    assert [item for item in measured if item[0] < 4.5] == []
    for control in page.find_elements(By.CSS_SELECTOR, "button, input, summary, canvas:not([aria-hidden]), progress, [role]"):
        if control.is_displayed():
            assert control.accessible_name or control.get_attribute("role") in ("alert", "status"), control.get_attribute("outerHTML")[:200]
    assert page.execute_script("return [...document.querySelectorAll('h1, h2')].map((h) => h.tagName)[0]") == "H1"


def test_the_pages_files_are_guarded_and_closed_in_themselves(site: str) -> None:
    for path in ("", *(f"page/{file.name}" for file in STATIC.iterdir() if file.name != "index.html")):
        answer = httpx.get(f"{site}{path}")
        assert answer.status_code == 200
        assert {name: answer.headers[name] for name in PAGE_HEADERS} == PAGE_HEADERS
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert httpx.head(f"{site}{path}").status_code == 200
        assert not re.search(r"(?:https?:)?//(?!www\.w3\.org/2000/svg)[a-z]", re.sub(r"^\s*// .*|, // .*", "", answer.text, flags=re.M))
        assert not re.search(r"\sstyle=|\son\w+=|<script>|innerHTML|eval\(", answer.text)
    for path in ("page/", "page/routes.py", "page/../routes.py", "page/%2e%2e/routes.py", "page/index.html"):
        assert httpx.get(f"{site}{path}").status_code == 404
    assert "/page/style.css" not in httpx.get(f"{site}openapi.json").json()["paths"]
