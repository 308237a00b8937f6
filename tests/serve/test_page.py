"""The page in a real browser: an answer, stop, regenerate, a restart, a narrow screen.

Needs playwright and a Chromium: on the PATH, or named by ``PYLLMLITE_CHROMIUM``.
"""

import os
import shutil
import signal
import time

import pytest

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = os.environ.get("PYLLMLITE_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-headless-shell", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    page = browser.new_page()
    page.set_default_timeout(10_000)
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.requests = []
    page.on("request", lambda request: page.requests.append(request.url))
    yield page
    page.close()


def say(page, text):
    page.fill("#ask", text)
    page.keyboard.press("Enter")


def until(page, condition, seconds=10):
    """Asked from here: the page's own policy forbids ``eval``."""
    end = time.monotonic() + seconds
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        time.sleep(0.02)


def done(page):
    until(page, "document.querySelector('#stop').disabled")


def test_answer_and_figures(page, server):
    page.goto(server.url)
    page.fill("#max_tokens", "20")
    page.fill("#temperature", "0")
    say(page, "Hello <b>!")
    page.wait_for_selector(".turn.assistant")
    done(page)
    assert page.text_content(".turn.user") == "Hello <b>!"
    first = page.text_content(".turn.assistant")
    assert first
    page.click("#again")
    done(page)
    assert page.locator(".turn.assistant").count() == 1
    assert page.text_content(".turn.assistant") == first  # temperature 0
    until(page, "document.querySelector('#held').textContent.includes(' of ')")
    assert page.text_content("#model") == "tiny"
    assert not page.errors
    assert all(url.startswith((server.url, "data:")) for url in page.requests)  # works offline
    page.click("#reset")
    assert page.locator(".turn").count() == 0


def test_stop_frees_the_engine(page, server):
    page.goto(server.url)
    page.fill("#max_tokens", "30000")
    page.fill("#temperature", "0")  # so that it does not end
    say(page, "Go on")
    until(page, "document.querySelector('.turn.assistant')?.textContent.length > 5")
    until(page, "+document.querySelector('#speed').textContent > 0")
    page.keyboard.press("Escape")
    done(page)
    server.until_idle()
    assert page.text_content(".turn.assistant") and not page.errors


def test_restart_is_told(page, start, model):
    from conftest import Server

    server = start()
    page.goto(server.url)
    page.fill("#max_tokens", "30000")
    page.fill("#temperature", "0")
    until(page, "document.querySelector('#held').textContent.includes(' of ')")
    say(page, "Go on")
    until(page, "document.querySelector('.turn.assistant')?.textContent.length > 5")
    server.stop(signal.SIGKILL)
    page.wait_for_selector(".turn.note")
    until(page, "document.querySelector('#notice').textContent.includes('restarted')")
    again = Server(model, "--port", str(server.port), "--threads", "1")
    try:
        again.wait_ready()
        until(page, "document.querySelector('#notice').hidden")
        page.fill("#max_tokens", "5")
        page.click("#again")
        done(page)
        assert page.text_content(".turn.assistant") and not page.errors
    finally:
        again.stop()


def test_narrow_screen(page, server):
    page.set_viewport_size({"width": 360, "height": 640})
    page.goto(server.url)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    for selector in ("#ask", "#send", "#stop"):
        assert page.locator(selector).is_visible()


def test_key_is_asked_for(page, start):
    server = start(env={"PYLLMLITE_API_KEY": "secret"})
    page.goto(server.url)
    page.wait_for_selector("#keybox:not([hidden])")
    page.fill("#key", "secret")
    page.keyboard.press("Tab")
    until(page, "document.querySelector('#notice').hidden")
    page.fill("#max_tokens", "3")
    say(page, "Hello")
    done(page)
    assert page.locator(".turn.assistant").count() == 1
