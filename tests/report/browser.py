"""Debian's chromium, headless: draws a page as a reader sees it and returns its elements or a picture."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
    "--v=0",
    "--virtual-time-budget=4000",
)


def executable() -> str:
    """Return the browser; a missing one fails the test, it is no reason to skip."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert found, "the page is tested in chromium, which is not installed: `apt-get install chromium`"
    return found


def dump(page: Path, fragment: str = "", *options: str) -> str:
    """Return the page's elements after its script ran; any message of the console fails."""
    with tempfile.TemporaryDirectory() as profile:
        url = page.resolve().as_uri() + (f"#{fragment}" if fragment else "")
        command = [executable(), *OPTIONS, *options, f"--user-data-dir={profile}", "--dump-dom", url]
        environment = {**os.environ, "HOME": profile}
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not said, said
    return done.stdout
