"""The Space in a process of its own, and a browser to look at it."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
# Nothing but the page may be asked for: the browser itself neither updates nor reports
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@contextmanager
def running_space(checkpoint: Path, log: Path, **environment: str) -> Iterator[str]:
    """
    `python spaces/app.py` with a checkpoint, ended with the context.

    Args:
        log: File that everything it says is written to.
        environment: More variables, such as `CLIP_ID`.

    Yields:
        Its address.

    Raises:
        RuntimeError: if it ends before it listens, with what it said.
    """
    own = {"MODEL_ID": str(checkpoint), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    with log.open("w") as said:
        process = subprocess.Popen(
            [sys.executable, ROOT / "spaces" / "app.py", "--host", "127.0.0.1"],
            stdout=subprocess.PIPE,
            stderr=said,
            env={**os.environ, **own, **environment},
            text=True,
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                    break
            else:
                raise RuntimeError(f"The Space ended with {process.wait()}:\n{log.read_text()}")
            yield found[0]
        finally:
            process.send_signal(signal.SIGTERM)
            with process.stdout:
                process.stdout.read()
            process.wait()


@contextmanager
def chromium() -> Iterator[Any]:
    """Debian's Chromium, driven by playwright; each of its contexts is an empty profile."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        try:
            yield browser
        finally:
            browser.close()
