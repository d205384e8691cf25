"""The Space in a real browser: every answer is held against plain `generate`, every picture against `visualize`."""

import io
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms.functional import pil_to_tensor
from transformers import AutoImageProcessor, AutoModel, CLIPVisionModel

from modeling_movekd.inference import load_checkpoint, user_message
from modeling_movekd.prompts import prepare
from tests.helpers.page_scripts import FAINT, FRAMES, OUTSIDE, PIXELS, WATCH
from tests.helpers.running_space import CHROMIUM, ROOT, TOWERS, build_checkpoint, chromium, running_space


pytest.importorskip("gradio", reason="the Space needs gradio")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
if CHROMIUM is None:
    pytest.skip("needs Chromium (Debian's package `chromium`)", allow_module_level=True)

expect = playwright.expect
pytestmark = pytest.mark.slow
SCENES = [ROOT / "spaces" / "examples" / f"scene_{number}.png" for number in (1, 2, 3)]
QUESTION, ANOTHER = "How many objects are there?", "What shape is the cyan object?"
TABS = ("Chat", "What the encoder sees", "About")
PATIENCE = 60_000  # ms; how long a loaded machine may take


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> SimpleNamespace:
    """The checkpoint's folder, and the same model here."""
    folder = tmp_path_factory.mktemp("checkpoint")
    build_checkpoint(folder)
    model, processor = load_checkpoint(str(folder))
    return SimpleNamespace(folder=folder, model=model, processor=processor)


@pytest.fixture(scope="module")
def generate(student) -> Callable[[Sequence[dict[str, Any]], int], str]:
    """The greedy answer to a conversation."""

    @torch.inference_mode()
    def answer(messages: Sequence[dict[str, Any]], tokens: int) -> str:
        inputs = prepare(student.processor, [messages], torch.device("cpu"))
        ids = student.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        return student.processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    return answer


@pytest.fixture(scope="module")
def space(student, tmp_path_factory) -> Iterator[str]:
    encoders = {"CLIP_ID": str(TOWERS / "clip"), "TEACHER_IDS": f"reader={TOWERS / 'reader'}"}
    with running_space(student.folder, tmp_path_factory.mktemp("log") / "said", **encoders) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as running:
        yield running


@pytest.fixture
def visit(browser, space) -> Iterator[Callable[..., Any]]:
    """Opens the page in a new profile. In the end: nothing was asked of another host, and nothing went wrong in it."""
    contexts, hosts, complaints = [], set(), []

    def open_page(width: int = 1280, height: int = 900, **settings: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, **settings)
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        context.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
        page = context.new_page()
        page.on("websocket", lambda socket: hosts.add(urlsplit(socket.url).hostname))
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(space)
        expect(question(page)).to_be_editable()
        return page

    expect.set_options(timeout=PATIENCE)
    yield open_page
    for context in contexts:
        context.close()
    assert hosts <= {"127.0.0.1", None}  # None: data and blobs in the page itself
    assert complaints == []


def question(page: Any) -> Any:
    return page.locator("#question textarea")


def answers(page: Any) -> Any:
    return page.locator("#chatbot").get_by_test_id("bot")


def attach(page: Any, *files: Path) -> None:
    expect(question(page)).to_be_editable()  # the end of an answer clears what was attached before
    with page.expect_file_chooser() as chooser:
        page.locator("#question").get_by_label("Upload a file").click()
    chooser.value.set_files(files)
    expect(page.get_by_label("File thumbnail")).to_have_count(len(files))


def set_length(page: Any, tokens: int) -> None:
    field = page.get_by_label("number input for Longest answer")
    if not field.is_visible():
        page.get_by_role("button", name="Settings").first.click()
    slider = page.get_by_label("range slider for Longest answer")
    # Just unfolded, the slider may still be given its first value, over what was typed
    while slider.input_value() != str(tokens):
        field.fill(str(tokens))
        field.blur()
        page.evaluate(FRAMES)


def ask(page: Any, text: str) -> None:
    expect(question(page)).to_be_editable()
    question(page).fill(text)
    page.get_by_role("button", name="Submit").click()


def scene(number: int) -> Image.Image:
    return Image.open(SCENES[number - 1]).convert("RGB")


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def test_a_question_about_an_image_streams_what_generate_answers(visit, generate):
    page = visit()
    page.evaluate(WATCH)
    set_length(page, 24)
    attach(page, SCENES[1])
    ask(page, QUESTION)
    first = [user_message(QUESTION, [scene(2)])]
    answer = generate(first, 24)
    assert answer != generate([user_message(QUESTION, [scene(1)])], 24)
    expect(answers(page)).to_have_text([answer])
    assert all(answer.startswith(text) for text in page.evaluate("window.shown"))

    # The conversation goes on, with a second image
    attach(page, SCENES[2])
    ask(page, ANOTHER)
    expected = generate([*first, said(answer), user_message(ANOTHER, [scene(3)])], 24)
    assert expected != generate([user_message(ANOTHER, [scene(3)])], 24)
    expect(answers(page)).to_have_text([answer, expected])


def test_an_example_and_a_question_without_image(visit, generate):
    page = visit()
    set_length(page, 8)
    page.get_by_role("button", name=re.compile(f"example.*{re.escape(QUESTION)}")).click()
    expect(answers(page)).to_have_text([generate([user_message(QUESTION, [scene(1)])], 8)])
    page.get_by_role("button", name="Clear").click()
    expect(answers(page)).to_have_count(0)
    ask(page, ANOTHER)
    expect(answers(page)).to_have_text([generate([user_message(ANOTHER)], 8)])


def test_stop_ends_an_answer_and_the_next_question_is_answered(visit, generate):
    page = visit()
    set_length(page, 1024)
    attach(page, SCENES[0])
    ask(page, QUESTION)
    expect(answers(page)).to_have_text(re.compile(r"\w+ \w+"))
    early = answers(page).inner_text().strip()
    expect(answers(page)).not_to_have_text(early)
    later = answers(page).inner_text().strip()
    assert later.startswith(early) and len(later) > len(early)
    page.get_by_role("button", name="Stop", exact=True).click()
    expect(question(page)).to_be_editable()

    # Answers come one at a time: with the next one the first has really ended
    partial = answers(page).inner_text().strip()
    set_length(page, 8)
    ask(page, ANOTHER)
    expect(answers(page)).to_have_count(2)
    expect(page.get_by_role("button", name="Submit")).to_be_visible()
    partial = answers(page).first.inner_text().strip()
    first = [user_message(QUESTION, [scene(1)])]
    words = len(partial.split())
    assert words < 500 and generate(first, 2 * words).startswith(partial)
    expect(answers(page)).to_have_text([partial, generate([*first, said(partial), user_message(ANOTHER)], 8)])


def test_retry_answers_again_and_undo_takes_back(visit, generate):
    page = visit()
    set_length(page, 6)
    ask(page, QUESTION)
    expect(answers(page)).to_have_text([generate([user_message(QUESTION)], 6)])
    set_length(page, 12)
    page.get_by_role("button", name="Retry").click()
    expect(answers(page)).to_have_text([generate([user_message(QUESTION)], 12)])
    page.get_by_role("button", name="Undo").click()
    expect(answers(page)).to_have_count(0)
    expect(question(page)).to_have_value(QUESTION)


def pictures(student: SimpleNamespace, image: Image.Image, layer: int) -> dict[str, torch.Tensor]:
    """By title, the pictures of a layer (from 1), straight from the model, with other encoders' features as theirs."""
    processor = student.processor.image_processor
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    padded = ImageOps.pad(
        image, (max(image.size),) * 2, color=tuple(int(255 * value) for value in processor.image_mean)
    )
    with torch.inference_mode():
        plain = CLIPVisionModel.from_pretrained(TOWERS / "clip")(pixels, output_hidden_states=True)
        reader = AutoModel.from_pretrained(TOWERS / "reader")
        seen = AutoImageProcessor.from_pretrained(TOWERS / "reader")(padded, return_tensors="pt")["pixel_values"]
        maps = reader(seen).last_hidden_state
        others = {
            "clip": plain.hidden_states[layer][:, 1:],
            "reader": maps.flatten(2).transpose(1, 2) if maps.dim() == 4 else maps,
        }
        drawn = student.model.visualize(
            pixels, layer - 1, image_mean=processor.image_mean, image_std=processor.image_std, other_tokens=others
        )
    return {
        "What the encoder sees": drawn.image,
        "Experts": drawn.experts,
        "[CLS] attention": drawn.cls_attention,
        f"Student, layer {layer}": drawn.components,
        f"Plain CLIP, layer {layer}": drawn.others["clip"].components,
        "Reader, last layer": drawn.others["reader"].components,
        f"Distance to plain CLIP, layer {layer}": drawn.others["clip"].distance,
        "Distance to reader, last layer": drawn.others["reader"].distance,
    }


def check_pictures(page: Any, expected: dict[str, torch.Tensor]) -> None:
    """Each figure holds the model's picture, and shows it."""
    figures = page.locator("#pictures figure")
    expect(figures.locator("b")).to_have_text(list(expected))
    for index, (title, picture) in enumerate(expected.items()):
        image = figures.nth(index).locator("img")
        side = picture.shape[1]
        held = torch.tensor(image.evaluate(PIXELS, side)).view(side, side, 4)
        assert (held[..., 3] == 255).all(), title
        # Experts folded into the weights, as they are there, round otherwise than ours
        assert (held[..., :3] - picture[0].int()).abs().max() <= 3, title
        shown = Image.open(io.BytesIO(image.screenshot())).convert("RGB").resize((side, side), Image.Resampling.BOX)
        shown = pil_to_tensor(shown).permute(1, 2, 0)[4:-4, 4:-4]  # without the round corners
        assert (shown.int() - picture[0, 4:-4, 4:-4].int()).abs().float().mean() < 16, title
    drawn = {picture.numpy().tobytes() for picture in expected.values()}
    assert len(drawn) == len(expected)


def test_pictures_are_the_models_own_for_each_image_and_layer(visit, student, tmp_path):
    page = visit()
    page.get_by_role("tab", name=TABS[1]).click()
    depth = student.model.config.vision_config.num_hidden_layers
    caption = page.locator("#pictures caption")
    expect(caption).to_contain_text(f"layer {depth}")
    first = pictures(student, scene(1), depth)
    check_pictures(page, first)

    layer = page.get_by_label("number input for Layer")
    layer.fill("1")
    layer.blur()
    expect(caption).to_contain_text("layer 1")
    check_pictures(page, pictures(student, scene(1), 1))

    wide = scene(2).resize((96, 60))
    wide.save(tmp_path / "wide.png")
    before = page.locator("#pictures figure img").first.get_attribute("src")
    page.locator("#picture").get_by_role("button", name="Remove Image").click()
    page.locator("#picture input[type=file]").first.set_input_files(tmp_path / "wide.png")
    expect(page.locator("#pictures figure")).to_have_count(len(first))
    expect(page.locator("#pictures figure img").first).not_to_have_attribute("src", before)
    check_pictures(page, pictures(student, wide, 1))


def test_the_last_choice_is_drawn_however_fast_the_choices_came(visit, student):
    page = visit()
    # The long answer has its turn first: the choices are made while none of their pictures can be drawn
    set_length(page, 1024)
    ask(page, QUESTION)
    expect(answers(page)).to_have_text(re.compile(r"\w+ \w+"))
    page.get_by_role("tab", name=TABS[1]).click()
    for number in (1, 2):
        page.locator("button.gallery-item").nth(number).click()
        expect(page.locator("#picture img")).to_have_attribute("src", re.compile(SCENES[number].name))
    page.get_by_role("tab", name=TABS[0]).click()
    page.get_by_role("button", name="Stop", exact=True).click()
    page.get_by_role("tab", name=TABS[1]).click()
    expected = pictures(student, scene(3), student.model.config.vision_config.num_hidden_layers)
    pixels = pil_to_tensor(Image.fromarray(expected["What the encoder sees"][0].numpy()).convert("RGBA"))
    page.wait_for_function(
        f"""(expected) => {{
            const image = document.querySelector('#pictures figure img');
            return image && ({PIXELS})(image, 64).join() === expected;
        }}""",
        arg=",".join(map(str, pixels.permute(1, 2, 0).flatten().tolist())),
    )
    check_pictures(page, expected)


def test_the_about_tab_counts_and_measures(visit, student):
    page = visit()
    page.get_by_role("tab", name=TABS[2]).click()
    count = sum(parameter.numel() for parameter in student.model.parameters())
    expect(page.locator("#about")).to_contain_text(f"{count:,}")
    with page.expect_request("**/queue/join*"):
        page.get_by_role("button", name="Measure").click()
    measured = re.compile(r"(\d+\.\d+) s to the first token.* (\d+\.\d+) tokens per second over 32 tokens")
    expect(page.locator("#speed")).to_contain_text(measured)
    found = measured.search(page.locator("#speed").inner_text())
    assert found and float(found[1]) > 0 and float(found[2]) > 0


def test_what_cannot_be_read_gets_a_sentence_and_the_next_question_an_answer(visit, generate, tmp_path):
    broken, huge, heavy, text = (tmp_path / name for name in ("broken.png", "huge.png", "heavy.png", "text.txt"))
    broken.write_bytes(SCENES[0].read_bytes()[:300])
    Image.new("1", (10_001, 8)).save(huge)
    heavy.write_bytes(bytes(21 << 20))
    text.write_text("no image")
    page = visit()
    set_length(page, 8)
    for path, sentence in ((broken, "cannot be decoded"), (huge, "10001 x 8 pixels")):
        attach(page, path)
        ask(page, QUESTION)
        expect(page.locator("#chatbot").get_by_text(sentence)).to_be_visible()
    for path, sentence in ((heavy, "exceed the maximum allowed size of 20.0 Mb"), (text, "Invalid file type")):
        page.locator("#question input[type=file]").set_input_files(path)
        expect(page.get_by_test_id("toast-body").filter(has_text=sentence)).to_be_visible()
    attach(page, SCENES[0])
    ask(page, QUESTION)
    expect(answers(page).last).to_have_text(generate([user_message(QUESTION, [scene(1)])], 8))

    page.get_by_role("tab", name=TABS[1]).click()
    page.locator("#picture").get_by_role("button", name="Remove Image").click()
    page.locator("#picture input[type=file]").first.set_input_files(broken)
    expect(page.locator("#pictures").get_by_role("alert")).to_contain_text("cannot be decoded")


def test_a_phone_shows_it_all_within_400_pixels(visit, generate):
    page = visit(width=400, height=800, has_touch=True, is_mobile=True)
    set_length(page, 24)
    attach(page, SCENES[0])
    ask(page, QUESTION)
    expect(answers(page)).to_have_text([generate([user_message(QUESTION, [scene(1)])], 24)])
    for name in TABS:
        page.get_by_role("tab", name=name).tap()
        expect(page.get_by_role("tab", name=name)).to_have_attribute("aria-selected", "true")
        assert page.evaluate("[innerWidth, document.scrollingElement.scrollWidth]") == [400, 400], name
        assert page.evaluate(OUTSIDE) == [], name


def test_the_keyboard_alone_asks_and_opens_tabs(visit, generate):
    page = visit()

    def tab_to(element: Any) -> None:
        for _ in range(40):
            element.page.keyboard.press("Tab")
            if element.evaluate("element => element === document.activeElement"):
                return
        pytest.fail(f"{element} is not reached by the keyboard")

    set_length(page, 1024)  # time to reach the button that stops it
    tab_to(page.get_by_role("button", name=re.compile("example 1")))
    tab_to(question(page))
    page.keyboard.type(ANOTHER)
    page.keyboard.press("Enter")
    expect(page.get_by_test_id("user")).to_have_text([ANOTHER])
    # Gradio cannot stop what the queue has not yet given a number: the answer must have begun
    expect(answers(page)).to_have_text(re.compile(r"\w+ \w+"))
    tab_to(page.get_by_role("button", name="Stop", exact=True))
    page.keyboard.press("Enter")
    expect(question(page)).to_be_editable()

    page = visit()
    tab_to(page.get_by_role("tab", name=TABS[1]))
    page.keyboard.press("Enter")
    expect(page.locator("#pictures figure").first).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_stand_out_from_what_is_behind_them(visit, scheme):
    page = visit(color_scheme=scheme)
    color = page.locator("gradio-app").evaluate("element => getComputedStyle(element).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", color)[:3])) < 60) == (scheme == "dark")
    set_length(page, 6)
    ask(page, QUESTION)
    expect(answers(page)).to_have_count(1)
    expect(question(page)).to_be_editable()
    for name in TABS:
        page.get_by_role("tab", name=name).click()
        expect(page.get_by_role("tab", name=name)).to_have_attribute("aria-selected", "true")
        assert page.evaluate(FAINT) == [], name
