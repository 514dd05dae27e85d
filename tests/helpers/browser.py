"""Debian's Chromium, without a screen, for tests of pages."""

import json
import shutil
import time

import cv2
import numpy as np
import pytest

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions")
KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39,
        "ArrowDown": 40}


class Browser:
    """A browser that opens pages as files. Skips the test where there is no Chromium or no selenium."""

    def __init__(self, profile):
        webdriver = pytest.importorskip("selenium.webdriver", reason="no selenium to drive a browser with")
        paths = [shutil.which(name) for name in ("chromium", "chromedriver")]
        if None in paths:
            pytest.skip("no chromium or chromedriver to open pages with (Debian: chromium, chromium-driver)")
        options = webdriver.ChromeOptions()
        options.binary_location = paths[0]
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(paths[1]))
        self.driver.set_script_timeout(60)

    def close(self):
        self.driver.quit()

    def cdp(self, command, **arguments):
        return self.driver.execute_cdp_cmd(command, arguments)

    def open(self, page, fragment="", width=1400, height=900, dark=False, calm=False):
        """Open an index.html as a double click would. dark, calm: what the reader's system prefers."""
        self.cdp("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                 mobile=width < 600)
        wishes = {"prefers-color-scheme": "dark" if dark else "light",
                  "prefers-reduced-motion": "reduce" if calm else "no-preference"}
        self.cdp("Emulation.setEmulatedMedia", features=[{"name": k, "value": v} for k, v in wishes.items()])
        self.driver.get("about:blank")
        for log in ("browser", "performance"):
            self.driver.get_log(log)  # forgets what earlier pages did
        self.driver.get(f"{page.resolve().as_uri()}#{fragment}")

    def run(self, script, *arguments):
        """The value of a JavaScript expression; arguments[0], ... are given."""
        return self.driver.execute_script(f"return ({script})", *arguments)

    def until(self, script, *arguments, seconds=30):
        """Wait until an expression is true, and return its value."""
        end = time.monotonic() + seconds
        while not (value := self.run(script, *arguments)):
            assert time.monotonic() < end, f"never came true: {script}"
            time.sleep(0.05)
        return value

    def click(self, selector, nth=0):
        """A click of the mouse in the middle of an element, which must be what lies there."""
        x, y = self.middle(selector, nth)
        assert self.run("document.querySelectorAll(arguments[0])[arguments[1]].contains("
                        "document.elementFromPoint(arguments[2], arguments[3]))", selector, nth, x, y), selector
        self.mouse("mousePressed", x, y, button="left", clickCount=1)
        self.mouse("mouseReleased", x, y, button="left", clickCount=1)

    def middle(self, selector, nth=0):
        return self.run("(e => { e.scrollIntoView({block: 'nearest'}); const b = e.getBoundingClientRect();"
                        " return [b.x + b.width / 2, b.y + b.height / 2]; })"
                        "(document.querySelectorAll(arguments[0])[arguments[1]])", selector, nth)

    def mouse(self, kind, x, y, **more):
        self.cdp("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def press(self, *keys):
        """Keys of KEYS, or characters."""
        for key in keys:
            code = {"key": key, "windowsVirtualKeyCode": KEYS[key]} if key in KEYS else {"key": key, "text": key}
            if key == "Enter":
                code["text"] = "\r"
            self.cdp("Input.dispatchKeyEvent", type="keyDown", **code)
            self.cdp("Input.dispatchKeyEvent", type="keyUp", **{k: v for k, v in code.items() if k != "text"})

    def picture(self):
        """What is on the screen, uint8 [H, W, 3]."""
        return cv2.imdecode(np.frombuffer(self.driver.get_screenshot_as_png(), np.uint8), cv2.IMREAD_COLOR)

    def complaints(self):
        """What the console and uncaught errors say."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self):
        """The addresses that were asked for since the page was opened."""
        messages = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
