"""A headless Chromium, steered over its DevTools protocol through two pipes: no driver and no package is needed."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from itertools import count
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    *("--headless=new", "--remote-debugging-pipe", "--no-first-run", "--disable-gpu", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions"),
    *("--no-sandbox", "--disable-dev-shm-usage", "--mute-audio", "--force-color-profile=srgb"),
)
KEYS = {"Tab": 9, "Enter": 13, "ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35, "Escape": 27}


class Chromium:
    """One process. Close it at the end."""

    def __init__(self) -> None:
        assert CHROMIUM is not None
        self._profile = tempfile.mkdtemp(prefix="chromium-")
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        # It takes commands from descriptor 3 and answers on 4.
        shell = f'exec "$0" "$@" 3<&{to_read} 4>&{to_write}'
        command = ["bash", "-c", shell, CHROMIUM, *FLAGS, f"--user-data-dir={self._profile}", "about:blank"]
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(command, pass_fds=(to_read, to_write), stdout=quiet, stderr=quiet)
        os.close(to_read)
        os.close(to_write)
        self._ids, self._rest = count(1), b""
        self.events: list[dict[str, Any]] = []

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(20)
        os.close(self._write)
        os.close(self._read)
        shutil.rmtree(self._profile, ignore_errors=True)

    def send(self, method: str, session: str = "", **parameters: Any) -> dict[str, Any]:
        """A command and its answer; events that come meanwhile are kept."""
        number = next(self._ids)
        message = {"id": number, "method": method, "params": parameters}
        os.write(self._write, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            found = self.receive(deadline - time.monotonic())
            if found.get("id") == number:
                assert "error" not in found, f"{method}: {found['error']}"
                result: dict[str, Any] = found["result"]
                return result
        raise AssertionError(f"no answer to {method}")

    def receive(self, timeout_s: float) -> dict[str, Any]:
        """The next message; an empty one if none comes in time."""
        while b"\0" not in self._rest:
            if not select.select([self._read], [], [], max(0.0, timeout_s))[0]:
                return {}
            self._rest += os.read(self._read, 2**20)
        message, self._rest = self._rest.split(b"\0", 1)
        found: dict[str, Any] = json.loads(message)
        if "method" in found:
            self.events.append(found)
        return found


class Page:
    """A tab at an address, with a size in pixels."""

    def __init__(self, chromium: Chromium, url: str, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        self._chromium = chromium
        self._target = chromium.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = chromium.send("Target.attachToTarget", targetId=self._target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        # Otherwise a tab is hidden while another one is in front.
        self.send("Emulation.setFocusEmulationEnabled", enabled=True)
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        media = {"prefers-color-scheme": "dark" if dark else "light", "prefers-reduced-motion": "reduce"}
        self.send("Emulation.setEmulatedMedia", features=[{"name": k, "value": v} for k, v in media.items()])
        self.send("Page.navigate", url=url)

    def close(self) -> None:
        """A tab that is open keeps a connection, and a browser has six of them to a server."""
        self._chromium.send("Target.closeTarget", targetId=self._target)

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._chromium.send(method, self._session, **parameters)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait_for(self, expression: str, timeout_s: float = 20.0) -> Any:
        """Until the expression is true; returns its value. It may fail until then."""
        tried = f"(() => {{ try {{ return {expression} }} catch {{ return null }} }})()"
        deadline = time.monotonic() + timeout_s
        while not (value := self.evaluate(tried)):
            assert time.monotonic() < deadline, f"{expression} did not become true: {self.text()[:2000]}"
            time.sleep(0.05)
        return value

    def text(self) -> str:
        found: str = self.evaluate("document.body.innerText")
        return found

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            # What a form takes for its submission is the text of the key.
            text = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS[key], **text)

    def type(self, text: str) -> None:
        self.send("Input.insertText", text=text)

    def screenshot(self, path: Path, whole: bool = False) -> None:
        shot = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def complaints(self) -> list[str]:
        """Errors of the console and of scripts, and requests that failed or were blocked, so far."""
        self.evaluate("0")
        found = []
        for event in self._chromium.events:
            if event.get("sessionId") != self._session:
                continue
            details = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                found.append(details["exceptionDetails"]["text"])
            elif event["method"] == "Log.entryAdded" and details["entry"]["level"] == "error":
                found.append(f"{details['entry']['text']} {details['entry'].get('url', '')}")
            elif event["method"] == "Runtime.consoleAPICalled" and details["type"] in ("error", "warning"):
                found.append(str(details["args"]))
        return found

    def requested(self) -> list[str]:
        """Addresses that the page has asked for."""
        sent = [e for e in self._chromium.events if e["method"] == "Network.requestWillBeSent"]
        return [e["params"]["request"]["url"] for e in sent if e.get("sessionId") == self._session]
