"""
Takes the README's pictures of the Space from the running app:

    PYTHONPATH=. python tests/helpers/take_screenshots.py [outputs/demo]

It writes assets/space_chat.png and assets/space_pictures.png.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import expect

from tests.helpers.running_space import ROOT, chromium, running_space


QUESTIONS = [
    ("scene_2.png", "What shape is the cyan object?"),
    (None, "How many objects are there?"),
]


def chat(page: Any, path: Path) -> None:
    question = page.locator("#question textarea")
    for number, (image, text) in enumerate(QUESTIONS, start=1):
        expect(question).to_be_editable()
        if image:
            page.locator("#question input[type=file]").set_input_files(ROOT / "spaces" / "examples" / image)
            page.get_by_label("File thumbnail").wait_for()
        question.fill(text)
        question.press("Enter")
        page.get_by_test_id("bot").nth(number - 1).wait_for()
    expect(question).to_be_editable()
    page.mouse.move(0, 0)
    page.screenshot(path=path, animations="disabled")


def pictures(page: Any, path: Path) -> None:
    page.get_by_role("tab", name="What the encoder sees").click()
    page.locator("#pictures figure").first.wait_for()
    page.screenshot(path=path, full_page=True, animations="disabled")


def main(checkpoint: str = "outputs/demo") -> None:
    expect.set_options(timeout=60_000)
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        with running_space(Path(checkpoint).resolve(), Path(folder) / "said") as address:
            for take, name, height in ((chat, "space_chat.png", 1000), (pictures, "space_pictures.png", 900)):
                page = browser.new_page(viewport={"width": 1280, "height": height}, color_scheme="light")
                page.goto(address)
                take(page, ROOT / "assets" / name)


if __name__ == "__main__":
    main(*sys.argv[1:])
