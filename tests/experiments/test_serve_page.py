# SPDX-License-Identifier: Apache-2.0
"""The page of `nlx serve` in a real browser: what a person does there, and what they then see."""

import contextlib
import json
import re
import shutil
import subprocess
import time
import urllib.request

import pytest
from nlx_experiments.serve_process import Server, small_run

DRIVER = shutil.which("chromedriver")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (DRIVER and CHROMIUM), reason="no chromium and chromedriver are installed here"
    ),
]
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run
--disable-background-networking --disable-component-update --disable-sync"""


class Browser:
    """A browser that is told what to do as W3C's WebDriver says."""

    def __init__(self, driver, profile):
        self.at = f"http://127.0.0.1:{driver}"
        arguments = [*FLAGS.split(), f"--user-data-dir={profile}", "--window-size=1000,1400"]
        options = {"args": arguments, "binary": CHROMIUM}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options}
        wanted["goog:loggingPrefs"] = {"browser": "ALL"}
        made = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self.at += f"/session/{made['sessionId']}"

    def _ask(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.at + path, data, method=method)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["value"]

    def go(self, address):
        self._ask("POST", "/url", {"url": address})

    def run(self, script, *arguments):
        return self._ask("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def click(self, name):
        found = self._ask("POST", "/element", {"using": "css selector", "value": f"#{name}"})
        self._ask("POST", f"/element/{next(iter(found.values()))}/click", {})

    def text(self, name):
        return self.run("return document.getElementById(arguments[0]).textContent", name)

    def fill(self, name, value):
        self.run("document.getElementById(arguments[0]).value = arguments[1]", name, value)

    def wait(self, name, pattern):
        """Until the element's text matches."""
        end = time.monotonic() + 120
        while not re.search(pattern, self.text(name)):
            if time.monotonic() > end:
                raise AssertionError(f"#{name} says {self.text(name)!r}, never {pattern!r}")
            time.sleep(0.05)

    def complaints(self):
        """What the browser's console holds."""
        return [entry["message"] for entry in self._ask("POST", "/se/log", {"type": "browser"})]

    def resize(self, width, height):
        self._ask("POST", "/window/rect", {"width": width, "height": height})

    def end(self):
        self._ask("DELETE", "")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Server(small_run(tmp_path_factory.mktemp("page"))) as made:
        yield made


@pytest.fixture
def browser(tmp_path):
    process = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, text=True)
    try:
        port = next(
            m[1] for line in process.stdout if (m := re.search(r"successfully on port (\d+)", line))
        )
        made = Browser(port, tmp_path / "profile")
        yield made
        with contextlib.suppress(OSError):
            made.end()
    finally:
        process.terminate()
        process.communicate()


def test_a_person_watches_a_memory_change(server, browser):
    browser.go(f"http://127.0.0.1:{server.port}/")
    browser.wait("memory", "Your memory is empty")
    browser.wait("about", "deltanet-tiny; [0-9,]+ bytes of memory a user")
    browser.fill("text", "3 and 4, né <b>3 & 4</b>\n" * 4)
    browser.click("remember")
    browser.wait("status", "^Remembered")
    browser.wait("memory", "104 tokens, all of it saved")
    shown = browser.text("surprise")
    assert shown == "3 and 4, né <b>3 & 4</b>\u21b5\n" * 4
    costs = browser.run(
        "return [...document.querySelectorAll('#surprise span')].map(s => [s.dataset.bits, "
        "s.className])"
    )
    assert len(costs) == 100
    assert {name for _, name in costs} <= {f"s{n}" for n in range(8)}
    bits = [float(cost) for cost, _ in costs]
    browser.wait("cost", f"104 tokens, {sum(bits) / 104:.2f} bits a byte")
    token = browser.run("return localStorage.getItem('nlx-token')")
    held = server.ask("GET", "/v1/memory", token=token)
    assert held == (200, {"position": 104, "unsaved": False})
    moved = "return [...document.querySelectorAll('#levels .value')].map(v => v.dataset.moved)"
    assert all(float(length) > 0 for length in browser.run(moved))
    browser.wait("levels", "block 0, memory *every token")
    assert browser.run("return document.querySelector('#levels path').getTotalLength()") > 0

    browser.click("generate")
    browser.wait("status", "^Continued")
    kept, blank = browser.text("with"), browser.text("without")
    assert kept.startswith("The red")
    assert len(kept) > 20 < len(blank)
    asked = {"prompt": "The red", "length": 80, "temperature": 0.5}
    assert "The red" + server.ask("POST", "/v1/generate", asked, token)[1]["text"] == kept

    browser.click("read")
    browser.wait("memory", "208 tokens, not all of it saved")
    browser.wait("status", "^Read")
    browser.click("load")
    browser.wait("memory", "104 tokens, all of it saved")
    browser.go(f"http://127.0.0.1:{server.port}/")
    browser.wait("memory", "104 tokens, all of it saved")
    browser.click("forget")
    browser.wait("forget", "Really")
    browser.click("forget")
    browser.wait("status", "^Forgotten")
    browser.wait("memory", "empty")
    browser.click("load")
    browser.wait("status", "no memory was saved")
    complaints = [told for told in browser.complaints() if "409 (Conflict)" not in told]
    assert complaints == []


def test_the_page_fits_a_small_screen_and_names_what_it_holds(server, browser):
    browser.go(f"http://127.0.0.1:{server.port}/")
    browser.wait("memory", "empty")
    browser.resize(500, 900)
    wide = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert browser.run(wide) == 0
    unnamed = """return [...document.querySelectorAll('input, textarea, button, section')].filter(
      e =>
      !(e.labels?.length || e.textContent.trim() || e.ariaLabel || e.ariaLabelledByElements?.length)
    ).length"""
    assert browser.run(unnamed) == 0
    assert browser.run("return document.documentElement.lang") == "en"


def test_a_server_that_is_gone_is_told(server, browser, tmp_path):
    with Server(small_run(tmp_path)) as gone:
        browser.go(f"http://127.0.0.1:{gone.port}/")
        browser.wait("memory", "empty")
    browser.click("read")
    browser.wait("status", "does not answer")
