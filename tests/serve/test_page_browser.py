"""The page of `mmbert serve` in headless Chromium: it predicts under its own policy. Skipped without a browser."""

from collections.abc import Iterator

import pytest

from tests.support.browser import Browser, needs_browser, started_browser
from tests.support.serving import ROW, wait_for

pytestmark = needs_browser

FILL_AND_SUBMIT = """(() => {
  for (const field of document.querySelectorAll("[data-kind]")) field.value = %s[field.name];
  document.querySelector("form").requestSubmit();
})()"""
IS_PENDING = "!document.getElementById('summary').textContent && !document.getElementById('error').textContent"


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    with started_browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


def text_of(browser: Browser, element: str) -> str:
    return browser.value(f"document.getElementById('{element}').innerText")


@pytest.mark.parametrize("width", [400, 1200])
def test_a_row_is_classified_and_its_words_are_marked(server, browser, width):
    browser.resize(width)
    browser.open(server.url)
    assert browser.value("document.getElementById('result').hidden") is True
    browser.value(FILL_AND_SUBMIT % ROW)
    wait_for(lambda: not browser.value(IS_PENDING))
    prediction = server.predictor.predict(ROW)
    shares = [1 - prediction["prob"], prediction["prob"]]
    assert text_of(browser, "error") == ""
    predicted_share = shares[int(prediction["pred"])]
    assert text_of(browser, "summary") == f"label: {prediction['pred']} ({100 * predicted_share:.1f} %)"
    assert text_of(browser, "bars").split() == ["0", f"{100 * shares[0]:.1f}", "%", "1", f"{100 * shares[1]:.1f}", "%"]
    assert browser.value("document.getElementById('text').textContent") == ROW["text"]
    assert browser.value("document.querySelectorAll('#text .for, #text .against').length") > 0
    assert '"text": "please refund my money"' in text_of(browser, "request")
    assert text_of(browser, "curl").endswith(f"{server.url}predict")
    assert browser.value("document.documentElement.scrollWidth") <= width
    assert browser.complaints() == []
    assert {url.removeprefix(server.url) for url in browser.requested()} <= {"", "explain", "favicon.ico"}


def test_what_the_server_refuses_is_shown(server, browser):
    browser.open(server.url)
    browser.value(FILL_AND_SUBMIT % {**ROW, "text": "x" * 1_100_000})
    wait_for(lambda: not browser.value(IS_PENDING))
    assert "expected a body of at most 1000000 bytes" in text_of(browser, "error")
    assert browser.value("document.getElementById('result').hidden") is True
