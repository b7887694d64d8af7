"""The page in a browser, as visitors use it; runs where Playwright is installed and a Chromium is found."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio", reason="the space extra is not installed")
pytest.importorskip("playwright", reason="pip install playwright")

import app
from playwright.sync_api import expect, sync_playwright
from space_case import RERO, TUBE, half_moving, with_tiny_model

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on the PATH")
expect.set_options(timeout=30_000)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patches:
        patches.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("cache")))
        with_tiny_model(patches)
        blocks = app.page()
        yield app.serve(blocks, prevent_thread_lock=True, quiet=True)[1]
        blocks.close()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])


def visit(chromium: Any, address: str, width: int = 1280) -> Any:
    page = chromium.new_page(viewport={"width": width, "height": 900})
    page.asked = set()
    page.on("request", lambda request: page.asked.add(request.url))
    page.goto(address)
    expect(row(page, "tokens")).to_contain_text("0.30")
    return page


def row(page: Any, name: str) -> Any:
    return page.get_by_role("row", name=name)


def upload(page: Any, video: Path) -> None:
    page.get_by_label("Clear").click()
    page.locator("input[type=file]").set_input_files(video)


def keep(page: Any, ratio: float) -> None:
    page.get_by_role("slider", name="keep ratio").fill(str(ratio))


def test_upload_slide_play_measure(chromium, address, tmp_path):
    page = visit(chromium, address)
    upload(page, half_moving(tmp_path / "half.mp4"))
    keep(page, 0.5)
    expect(page.get_by_text("Kept at each time step: 8, 8, 8, 8")).to_be_visible()
    overlay = page.locator("video").last
    expect(overlay).to_have_js_property("videoWidth", 910)
    before = overlay.evaluate("video => video.currentTime")
    page.wait_for_function("([video, before]) => video.currentTime != before", arg=[overlay.element_handle(), before])
    page.get_by_role("button", name="Measure").click()
    expect(
        page.get_by_text(re.compile(r"Measured: all tokens \d+ ms, the kept ones \d+ ms, ratio \d+\.\d\d"))
    ).to_be_visible()
    keep(page, 0.2)
    expect(page.get_by_text("Measured:")).to_have_count(0)
    assert not [url for url in page.asked if not url.startswith((address, "data:", "blob:"))]  # it works offline


def test_a_bad_file(chromium, address, tmp_path):
    page, bad = visit(chromium, address), tmp_path / "bad.mp4"
    bad.write_text("no video")
    upload(page, bad)
    expect(page.get_by_text("bad.mp4: undecodable")).to_be_visible()
    expect(row(page, "tokens")).to_have_count(0)


def test_two_visitors_at_once(chromium, address):
    pages = [visit(chromium, address) for _ in range(2)]
    for page, selector in zip(pages, (RERO, TUBE), strict=True):
        page.get_by_label("what is kept").click()
        page.get_by_role("option", name=selector).click()
    for ratios, counts in [((0.1, 0.9), (6, 60)), ((0.6, 0.2), (38, 16))]:  # ⌊ratio·64⌋; 4·(16 − ⌊(1 − ratio)·16⌋)
        for page, ratio in zip(pages, ratios, strict=True):
            keep(page, ratio)
        for page, count in zip(pages, counts, strict=True):
            expect(row(page, "tokens")).to_have_text(re.compile(rf"tokens\s*64\s*{count}\s*0\.\d\d"))


def test_on_a_phone_nothing_is_cut_off(chromium, address):
    page = visit(chromium, address, width=420)
    assert page.evaluate("document.documentElement.scrollWidth") <= 420
