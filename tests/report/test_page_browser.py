"""The page in headless Chromium. Skipped without a browser."""

import json
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmbert_core.report.page import SECTIONS, render
from mmbert_core.report.report_schema import report_of
from tests.support import reports
from tests.support.browser import COMMAND, SECONDS, Browser, needs_browser, started_browser

pytestmark = needs_browser
WIDTHS = (360, 390, 768, 1200)


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    with started_browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    for name, build in reports.EXAMPLES.items():
        (folder / f"{name}.html").write_text(render(report_of(build())), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in reports.EXAMPLES}


def test_a_script_that_does_run_would_be_seen(browser, tmp_path):
    (tmp_path / "page.html").write_text("<title>quiet</title><script>document.title='hit'</script>")
    browser.open(tmp_path / "page.html")
    assert browser.value("document.title") == "hit"


@pytest.mark.parametrize("kind", reports.EXAMPLES)
def test_nothing_runs_nothing_is_fetched_and_nothing_is_complained_about(browser, pages, kind):
    browser.open(pages[kind])
    assert browser.requested() == [pages[kind].as_uri()]
    assert browser.complaints() == []
    assert browser.value("document.title").startswith("womens_reviews: ") and browser.value("document.title") != "hit"
    loaded = ("document.scripts.length", "document.images.length", "document.links.length")
    num_inner_links = "document.querySelectorAll('a[href^=\"#\"]').length"
    assert browser.value(f"{' + '.join(loaded)} - {num_inner_links}") == 0


@pytest.mark.parametrize("kind", reports.EXAMPLES)
@pytest.mark.parametrize("width", WIDTHS)
def test_no_page_is_wider_than_its_window_and_every_section_is_seen(browser, pages, kind, width):
    browser.resize(width)
    browser.open(pages[kind])
    assert browser.value("innerWidth") == width
    assert browser.value("document.documentElement.scrollWidth") <= width
    outside = browser.value("""[...document.querySelectorAll('body *')]
        .filter(e => !e.closest('.scroll, nav ul, .skip, svg, .tokens') && e.getClientRects().length
                     && e.getBoundingClientRect().right > innerWidth + 1)
        .map(e => e.tagName + '.' + e.className + ' ' + e.textContent.slice(0, 40))""")
    assert outside == []
    seen = browser.value("""[...document.querySelectorAll('main > section')]
        .map(s => [s.querySelector('h2').textContent,
                   s.checkVisibility() && s.offsetHeight > 40 && s.offsetWidth > 0.5 * innerWidth])""")
    assert seen == [[name, True] for name, *_ in SECTIONS]


def test_dark_is_dark_and_paper_is_light(browser, pages):
    def ground() -> int:
        return sum(
            json.loads(
                browser.value("getComputedStyle(document.body).backgroundColor").replace("rgb(", "[").replace(")", "]")
            )
        )

    browser.resize(1200)
    browser.open(pages["binary"])
    try:
        for scheme, low, high in (("light", 600, 765), ("dark", 0, 150)):
            browser.do("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            assert low <= ground() <= high
        browser.do(
            "Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}]
        )
        assert (
            browser.value("getComputedStyle(document.documentElement).getPropertyValue('--text')").strip() == "#1a2230"
        )
        assert browser.value("getComputedStyle(document.querySelector('nav')).display") == "none"
    finally:
        browser.do("Emulation.setEmulatedMedia", media="", features=[])


def test_the_keyboard_reaches_the_content_and_every_box(browser, pages):
    browser.resize(390)
    browser.open(pages["binary"])

    def press(key: str, code: int) -> None:
        for kind in ("keyDown", "keyUp"):
            browser.do(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=code,
                text="\r" if key == "Enter" and kind == "keyDown" else "",
            )

    press("Tab", 9)
    assert (
        browser.value("document.activeElement.className") == "skip"
        and browser.value("document.activeElement.getBoundingClientRect().left") >= 0
    )
    press("Enter", 13)
    assert browser.value("location.hash") == "#content"
    boxes = browser.value("document.querySelectorAll('main .scroll:not(details .scroll)').length")
    reached = set()
    for _ in range(boxes + 20):
        press("Tab", 9)
        label = "(e => e.classList.contains('scroll') ? e.getAttribute('aria-label') : '')(document.activeElement)"
        reached.add(browser.value(label))
    assert len(reached - {""}) == boxes
    browser.value("document.querySelector('.scroll').focus({focusVisible: true})")
    assert browser.value("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_the_command_line_takes_a_picture_of_the_asked_size(pages, tmp_path):
    picture = tmp_path / "page.png"
    arguments = [
        *COMMAND,
        f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=390,800",
        f"--screenshot={picture}",
    ]
    subprocess.run([*arguments, pages["binary"].as_uri()], check=True, capture_output=True, timeout=SECONDS)
    assert struct.unpack(">II", picture.read_bytes()[16:24]) == (390, 800)
