"""The page of `dit-in-dit app` in a browser: `make test-docs`. It needs gradio, playwright and Chromium."""

from __future__ import annotations

import base64
import io
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import which
from typing import Any

import numpy as np
import pytest
from PIL import Image

import dit_in_dit as dd

CHROMIUM = which("chromium") or which("chromium-browser") or which("google-chrome")
pytestmark = [pytest.mark.docs, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")]
pytest.importorskip("gradio", reason="the page needs gradio")
api = pytest.importorskip("playwright.sync_api", reason="the browser is driven by playwright")
URI = re.compile(r"data:image/png;base64,([A-Za-z0-9+/=]+)")
PATIENCE = 120_000  # milliseconds


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a served page whose folder of runs is empty."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("runs")
    words = ["app", "--port", str(port), "--folder", str(folder), "--device", "cpu"]
    server = subprocess.Popen([sys.executable, "-m", "dit_in_dit", *words], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    lines = [server.stdout.readline() for _ in range(2)]
    assert f"the page is at http://127.0.0.1:{port}/" in lines[-1], lines
    yield f"http://127.0.0.1:{port}/"
    server.kill()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with api.sync_playwright() as engine:
        yield engine.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """The opened page; it may ask nobody else for anything, and its scripts may not fail."""
    context = browser.new_context(viewport={"width": 1400, "height": 1000})
    page, others, faults = context.new_page(), list[str](), list[str]()
    page.set_default_timeout(PATIENCE)
    page.on("request", lambda r: None if r.url.startswith((address, "data:", "blob:")) else others.append(r.url))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(address)
    page.wait_for_selector("#draw-go")
    yield page
    assert others == []
    assert faults == []
    context.close()


def test_a_page_for_other_machines_starts_and_asks_for_its_token(browser, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["app", "--host", "0.0.0.0", "--port", str(port), "--folder", str(tmp_path), "--device", "cpu"]
    server = subprocess.Popen([sys.executable, "-m", "dit_in_dit", *words], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        line = [server.stdout.readline() for _ in range(2)][-1]
        token = re.search(r"\?token=\S+", line)
        assert token, line
        page = browser.new_context().new_page()
        assert page.goto(f"http://127.0.0.1:{port}/").status == 401
        page.goto(f"http://127.0.0.1:{port}/{token[0]}")
        page.wait_for_selector("#draw-go", timeout=PATIENCE)
    finally:
        server.kill()


def images(html: str) -> list[np.ndarray]:
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))) for text in URI.findall(html)]


def test_the_page_shows_the_samples_of_the_command(page):
    page.fill("#draw-seed input", "7")
    page.fill("#draw-steps input[type=number]", "4")
    page.keyboard.press("Tab")
    page.click("#draw-go")
    page.wait_for_function("document.querySelectorAll('#draw-pictures section').length == 5")
    shown = images(page.inner_html("#draw-pictures"))
    for name, start in (("emoji", 0), ("emoji-dit", 4)):
        own = dd.load(name, "cpu").sample(num=4, seed=7, steps=4).pixels
        assert np.array_equal(np.stack(shown[start : start + 4]), own)


def test_a_wrong_value_is_refused_beside_the_fields_and_the_page_lives_on(page):
    page.fill("#draw-seed input", "-1")
    page.keyboard.press("Tab")
    page.click("#draw-go")
    page.wait_for_selector("#draw-message [role=alert]")
    assert "seed must be a whole number from 0" in page.inner_text("#draw-message")
    page.fill("#draw-seed input", "1")
    page.keyboard.press("Tab")
    page.click("#draw-go")
    page.wait_for_selector("#draw-pictures img")


def test_drawing_can_be_stopped(page):
    page.fill("#draw-steps input[type=number]", "100")
    page.keyboard.press("Tab")
    page.click("#draw-go")
    page.wait_for_selector("#draw-message progress")
    page.click("#draw-stop")
    page.wait_for_function("document.querySelector('#draw-message').innerText.includes('Stopped')")
    page.wait_for_timeout(1500)
    assert page.inner_text("#draw-message").strip() == "Stopped."


def test_the_keyboard_alone_draws(page):
    page.keyboard.press("Tab")
    for _ in range(60):
        if page.evaluate("document.activeElement.id") == "draw-go":
            break
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector("#draw-pictures img")


def test_the_maps_of_an_image_move_with_t(page):
    page.get_by_role("tab", name="Inside").click()
    page.click("#inside-go")
    maps = page.frame_locator("#inside-maps iframe")
    slider = maps.locator("input[type=range]").first
    before = maps.locator("body").inner_text()
    slider.focus()
    slider.press("ArrowRight")
    assert maps.locator("body").inner_text() != before


def test_a_design_follows_its_blocks_and_menus(page):
    page.get_by_role("tab", name="Design").click()
    page.wait_for_selector("#design-figure svg")
    page.click("#design-add-inner")
    page.wait_for_function("document.querySelector('#design-command').innerText.includes('outer*3 inner*3 inner*1')")
    assert "4 inner blocks" in page.inner_html("#design-figure")
    page.wait_for_function("document.querySelector('#design-numbers').innerText.includes('kept for the backward')")
    assert "plain twin of equal MACs" in page.inner_text("#design-numbers")
    page.get_by_role("button", name="Image, patches and time").click()
    page.get_by_label("patch_size").fill("7")
    page.keyboard.press("Tab")
    page.wait_for_selector("#design-message [role=alert]")
    assert "model.patch_size" in page.inner_text("#design-message")


def test_each_preset_is_loaded_whole(page):
    page.get_by_role("tab", name="Design").click()
    for name in ("dit-s4", "emoji-dit", "dit-xl2"):
        page.locator("#design-preset input").fill(name)
        page.get_by_role("option", name=name, exact=True).click()
        page.wait_for_function(f"document.querySelector('#design-figure').innerHTML.includes('{name}')")
        page.wait_for_function("document.querySelector('#design-numbers').innerText.includes('kept for')")
        command = f"dit-in-dit train --preset {name} --out"  # without a changed key
        assert command in " ".join(page.inner_text("#design-command").split())


def test_a_run_is_started_followed_and_stopped(page):
    page.get_by_role("tab", name="Runs").click()
    sets = "train.steps=5000 train.batch_size=2 train.evaluate_every=0 train.sample_every=4"
    page.fill("#runs-sets textarea, #runs-sets input", sets)
    page.fill("#runs-name textarea, #runs-name input", "mine")
    page.click("#runs-start")
    page.wait_for_function("/mine\\s*running/.test(document.querySelector('#runs-table').innerText)")
    page.locator("#runs-run input").click()
    page.get_by_role("option", name="mine").click()
    page.click("#runs-stop")
    page.wait_for_function("/mine\\s*stopped/.test(document.querySelector('#runs-table').innerText)")
    page.click("#runs-curves")
    page.wait_for_selector("#runs-figures img")


def test_the_data_and_the_nearest_images_are_shown(page):
    page.get_by_role("tab", name="Data").click()
    page.click("#data-go")
    page.wait_for_function("document.querySelectorAll('#data-facts img').length == 2")
    assert "322 held out" in page.inner_text("#data-facts")
    page.click("#data-near")
    page.wait_for_function("document.querySelectorAll('#data-found img').length == 16")


@pytest.mark.parametrize("width", [1400, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_screen_is_wider_than_the_window(browser, address, width, scheme):
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    page.goto(address)
    for name in ("Draw", "Inside", "Design", "Runs", "Data"):
        page.wait_for_selector("#draw-go", state="attached", timeout=PATIENCE)
        tab = page.get_by_role("tab", name=name).first
        if not tab.is_visible():
            page.locator(".overflow-menu > button").first.click()
            tab = page.locator(".overflow-dropdown button", has_text=name)
        tab.click()
        page.wait_for_timeout(800)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    context.close()


def memory(process: Path) -> float:
    """Resident memory of a process in MiB."""
    line = next(line for line in (process / "status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def test_twenty_sessions_draw_at_once_without_mixing(address):
    from gradio_client import Client

    emoji = dd.load("emoji", "cpu")
    port = address.rstrip("/").rpartition(":")[2]
    server = next(
        path for path in Path("/proc").glob("[0-9]*") if f"--port\0{port}" in (path / "cmdline").read_text("latin-1")
    )
    expected = {seed: emoji.sample(num=2, seed=seed, steps=2).pixels for seed in range(20)}
    most = [memory(server)]

    def session(seed: int) -> int:
        client, drawn, end = Client(address, verbose=False), 0, time.monotonic() + 60
        while time.monotonic() < end or not drawn:
            values = ("emoji", "no other model", False, "image estimate of the model", "all in turn", seed, 1.5, 2)
            *_, html, message = client.predict(*values, "unipc", 2, api_name="/draw")
            assert np.array_equal(np.stack(images(html)), expected[seed]), message
            drawn += 1
            most.append(memory(server))
        return drawn

    with ThreadPoolExecutor(20) as sessions:
        drawn = list(sessions.map(session, range(20)))
    print(f"{sum(drawn)} drawings by 20 sessions; memory {most[0]:.0f} to {max(most):.0f} MiB")
    assert max(most) < most[0] + 1500
