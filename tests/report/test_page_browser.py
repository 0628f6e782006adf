"""The page in headless Chromium, driven over DevTools' pipe with the standard library. Skipped without a browser."""

import json
import os
import select
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mmbert_core.report.page import SECTIONS, render
from mmbert_core.report.report_schema import report_of
from tests.support import reports

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome", "chrome") if (path := shutil.which(name))), None
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser, google-chrome or chrome on the path"),
]
COMMAND = [str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
WIDTHS = (360, 390, 768, 1200)
SECONDS = 120  # for one answer of the browser
# Moves the pipes to 3 and 4, where the browser looks for them, then becomes the browser.
LAUNCHER = """
import fcntl, os, sys
pipes = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3]]
for pipe, place in zip(pipes, (3, 4)):
    os.dup2(pipe, place)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """A tab. Commands go down one pipe, answers and events come up another, each a JSON text that ends in a NUL."""

    def __init__(self, folder: Path) -> None:
        down, self.down = os.pipe()
        self.up, up = os.pipe()
        arguments = [*COMMAND, "--remote-debugging-pipe", f"--user-data-dir={folder}", "about:blank"]
        launch = [sys.executable, "-c", LAUNCHER, str(down), str(up), *arguments]
        self.process = subprocess.Popen(
            launch, pass_fds=(down, up), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(down)
        os.close(up)
        self.buffer, self.number, self.session, self.events = b"", 0, "", []
        target = self.do("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.do("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.do(f"{domain}.enable")

    def do(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command and its answer; what happens meanwhile is kept in `events`."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters} | (
            {"sessionId": self.session} if self.session else {}
        )
        os.write(self.down, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        end = time.monotonic() + SECONDS
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.up], [], [], max(0, end - time.monotonic()))
            assert ready, f"no answer of the browser within {SECONDS} s"
            read = os.read(self.up, 1 << 20)
            assert read, "the browser has left"
            self.buffer += read
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)

    def open(self, path: Path) -> None:
        self.events.clear()
        self.do("Page.navigate", url=path.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def value(self, expression: str) -> Any:
        answer = self.do("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def resize(self, width: int, height: int = 900) -> None:
        self.do(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def close(self) -> None:
        os.close(self.down)  # the browser ends with its pipe
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.up)


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    started = Browser(tmp_path_factory.mktemp("profile"))
    yield started
    started.close()


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
    asked = [
        event["params"]["request"]["url"]
        for event in browser.events
        if event.get("method") == "Network.requestWillBeSent"
    ]
    assert asked == [pages[kind].as_uri()]
    loud = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Page.javascriptDialogOpening")
    told = [event["params"] for event in browser.events if event.get("method") in loud]
    assert told == []
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
