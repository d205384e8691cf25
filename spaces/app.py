"""
Talk to a checkpoint and look into it: a Gradio Space for ZeroGPU, a GPU or a CPU.

    python spaces/app.py [--port 7860] [--host 0.0.0.0] [--mcp]

The variables `MODEL_ID` and `MODEL_REVISION` name the checkpoint. Without them the app loads the demo's from
`outputs/demo`, where `accelerate launch train/sft.py` writes it. README.md lists all variables and endpoints.
"""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, help="defaults to the first free port from 7860 on")
    parser.add_argument("--host", help="address to listen on; defaults to 127.0.0.1")
    parser.add_argument("--mcp", action="store_true", help="also serve the endpoints as MCP tools, at /gradio_api/mcp")
    return parser.parse_args(arguments)


# Before the imports below, which take seconds
if __name__ == "__main__":
    parse_arguments()

from visitors import FOLDER  # before gradio


# isort: split
from zero_gpu import ON_ZERO_GPU  # before torch


# isort: split
import gradio as gr
from about import about
from encoders import CLONE, load_encoders
from endpoints import Endpoints, add_picture
from errors import explained
from limits import BodyLimits
from starlette.middleware import Middleware
from student import Student, load_student
from uploads import KEPT_SECONDS, MAX_FILE_MB, keep_deleting, refuse_addresses


HERE = Path(__file__).resolve().parent
DEMO = CLONE / "outputs" / "demo"
EXAMPLES = [
    ("scene_1.png", "How many objects are there?"),
    ("scene_2.png", "What shape is the cyan object?"),
    ("scene_3.png", "Is there a red circle?"),
]
THEME = gr.themes.Soft(
    primary_hue="indigo",
    secondary_hue="indigo",
    neutral_hue="slate",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
).set(
    # The grays and labels of Soft have less than WCAG's contrast of 4.5.
    body_text_color_subdued="*neutral_500",
    block_info_text_color="*neutral_500",
    input_placeholder_color="*neutral_500",
    input_placeholder_color_dark="*neutral_400",
    block_label_text_color="*primary_700",
    block_title_text_color="*primary_700",
    color_accent="*primary_600",
    link_text_color_dark="*primary_300",
    link_text_color_hover_dark="*primary_200",
    link_text_color_visited_dark="*primary_300",
    block_border_width="1px",
    input_border_color="*neutral_200",
)
CSS = (HERE / "style.css").read_text(encoding="utf-8")


def examples() -> list[tuple[str, str]]:
    """Return the path and the question of each example."""
    return [(str(HERE / "examples" / name), question) for name, question in EXAMPLES]


class Page(gr.Blocks):
    """`gr.Blocks` that downloads no file from an address, and logs no text of a visitor."""

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *state: Any, **settings: Any) -> list[Any]:
        # Gradio opens the files among the inputs of every event here.
        refuse_addresses(inputs)
        return await super().preprocess_data(block_fn, inputs, *state, **settings)

    async def process_api(self, *arguments: Any, **settings: Any) -> dict[str, Any]:
        # Gradio would log errors with the inputs that caused them.
        with explained():
            return await super().process_api(*arguments, **settings)


def build(student: Student, failures: Sequence[str], at_a_time: int) -> gr.Blocks:
    """Build the page and its endpoints. The arguments are those of [`Endpoints`]."""
    endpoints = Endpoints(student, failures, at_a_time)
    limits: dict[str, Any] = {"concurrency_limit": at_a_time}
    with Page(title="MoVE-KD", analytics_enabled=False, delete_cache=(60, KEPT_SECONDS), fill_width=False) as demo:
        gr.Markdown(
            "# MoVE-KD\n"
            "A vision-language model whose one encoder was distilled from several. Ask it about images, and see "
            "which of its experts looks at what. [Paper](https://arxiv.org/abs/2501.01709)",
            elem_id="header",
        )
        words = len(student.processor.tokenizer)
        if words < 1000:
            gr.Markdown(
                f"**A toy model is loaded.** It knows {words} words and pictures of shapes like the examples: ask it "
                "what colour or shape something is, whether there is one, how many there are, or which number is "
                "written.",
                elem_id="note",
            )
        with gr.Tabs():
            with gr.Tab("Chat", id="chat"):
                chat_tab(endpoints, limits)
            with gr.Tab("What the encoder sees", id="encoder"):
                encoder_tab(endpoints, limits)
            with gr.Tab("About", id="about"):
                about_tab(endpoints, demo)
        with gr.Row(visible=False):
            api(endpoints, limits)
    return demo


def chat_tab(endpoints: Endpoints, limits: dict[str, Any]) -> None:
    context = endpoints.context
    settings: list[Any] = [
        gr.Slider(0, 2, 0, step=0.05, label="Temperature", info="0 takes the likeliest word", render=False),
        gr.Slider(0.05, 1, 1, step=0.05, label="Top-p", info="for a temperature above 0", render=False),
        gr.Slider(
            1, min(1024, context // 2), min(256, context // 4), step=1, label="Longest answer, tokens", render=False
        ),
    ]
    textbox = gr.MultimodalTextbox(
        label="Your question",
        placeholder="Ask something; add, paste or drop images",
        sources=["upload"],
        file_types=["image"],
        file_count="multiple",
        stop_btn=True,
        elem_id="question",
        render=False,
    )
    gr.ChatInterface(
        endpoints.page_turn,
        multimodal=True,
        chatbot=gr.Chatbot(show_label=False, height="55vh", min_height=320, buttons=["copy"], elem_id="chatbot"),
        textbox=textbox,
        additional_inputs=settings,
        additional_inputs_accordion=gr.Accordion("Settings", open=False, render=False),
        examples=[[{"text": question, "files": [path]}] for path, question in examples()],
        cache_examples=False,
        api_name="page",
        api_visibility="private",
        **limits,
    )
    with gr.Accordion("Camera", open=False):
        camera = gr.Image(type="filepath", label="Take a picture for your next question", sources=["webcam"])
        camera.input(add_picture, [camera, textbox], textbox, api_visibility="private", queue=False)


def encoder_tab(endpoints: Endpoints, limits: dict[str, Any]) -> None:
    depth, image = endpoints.depth, examples()[0][0]
    with gr.Row():
        picture = gr.Image(
            type="filepath",
            label="Image",
            sources=["upload", "webcam", "clipboard"],
            height=260,
            value=image,
            elem_id="picture",
        )
        with gr.Column():
            layer = gr.Slider(
                1, depth, depth, step=1, label="Layer", info=f"{depth}, the last, feeds the language model"
            )
            gr.Examples([[path] for path, _ in examples()], [picture], label="Examples")
    first = "" if ON_ZERO_GPU else endpoints.page_pictures(image, depth)
    drawn = gr.HTML(first, label="Pictures", elem_id="pictures", padding=False)
    # A hidden file instead of `picture`: `gr.Image` would fail on a bad image before `decode` can say why.
    sent = gr.File(image, visible="hidden")
    picture.change(None, picture, sent, js="(image) => image")
    # One event for both inputs, because the results of two events could arrive in the wrong order.
    gr.on(
        [sent.change, layer.change],
        endpoints.page_pictures,
        [sent, layer],
        drawn,
        trigger_mode="always_last",
        api_visibility="private",
        **limits,
    )


def about_tab(endpoints: Endpoints, demo: gr.Blocks) -> None:
    def measure() -> str:
        """Measure how fast the model answers on this machine."""
        return endpoints.speed(*examples()[0])

    # On ZeroGPU a measurement takes a visitor's GPU time, so it waits for the button.
    measured = {"speed": "Speed: not measured yet on this machine."}
    if not ON_ZERO_GPU:
        measured["speed"] = "Speed: being measured; press the button to see it."

        def measure_first() -> None:
            try:
                measured["speed"] = measure()
            except gr.Error as error:
                measured["speed"] = f"Speed could not be measured: {error.message}"

        threading.Thread(target=measure_first, name="measure", daemon=True).start()
    gr.Markdown(about(endpoints.student), elem_id="about")
    speed = gr.Markdown(measured["speed"], elem_id="speed")
    button = gr.Button("Measure the speed now", size="md", elem_id="measure")
    button.click(measure, None, speed, api_name="speed", concurrency_limit=1)
    demo.load(lambda: measured["speed"], None, speed, api_visibility="private", queue=False)


def api(endpoints: Endpoints, limits: dict[str, Any]) -> None:
    """Add the endpoints for programs, whose components stay invisible."""
    message = gr.MultimodalTextbox(label="message", file_count="multiple")
    conversation = gr.State([])
    question = [gr.File(label="image"), gr.Textbox(label="question")]
    settings = [
        gr.Number(0, label="temperature"),
        gr.Number(1, label="top_p"),
        gr.Number(min(64, endpoints.context // 4), label="max_new_tokens"),
    ]
    image = [gr.File(label="image"), gr.Number(endpoints.depth, label="layer")]
    answer, gallery, shares, experts = gr.Textbox(), gr.Gallery(format="png"), gr.JSON(), gr.JSON()
    gr.Button().click(
        endpoints.chat, [message, conversation, *settings], [answer, conversation], api_name="chat", **limits
    )
    gr.Button().click(endpoints.ask, [*question, *settings], answer, api_name="ask", **limits)
    gr.Button().click(endpoints.pictures, image, [gallery, shares], api_name="pictures", **limits)
    gr.Button().click(endpoints.experts, image, experts, api_name="experts", **limits)


def find_student() -> Student:
    """Load the checkpoint that the environment names, else the demo's."""
    model_id = os.environ.get("MODEL_ID")
    if not model_id and not (DEMO / "config.json").is_file():
        raise ValueError(
            "There is no model to show. In a clone, train the demo with `accelerate launch train/sft.py` (a few "
            "minutes), or name a checkpoint by MODEL_ID and MODEL_REVISION."
        )
    return load_student(model_id or str(DEMO), os.environ.get("MODEL_REVISION"))


def whole_number(name: str, default: int) -> int:
    """Read a number above 0 from the environment."""
    value = os.environ.get(name) or str(default)
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"{name} is {value!r}; set a whole number above 0.")
    return int(value)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        student = find_student()
        student.encoders, failures = load_encoders(student)
        at_a_time, waiting = whole_number("CONCURRENCY", 1), whole_number("QUEUE_SIZE", 20)
        demo = build(student, failures, at_a_time)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    own = {Path(path).read_bytes() for path, _ in examples()}
    threading.Thread(target=keep_deleting, args=(FOLDER, own), name="delete", daemon=True).start()
    demo.queue(max_size=waiting, default_concurrency_limit=at_a_time)
    try:
        demo.launch(
            server_name=options.host,
            server_port=options.port,
            mcp_server=options.mcp or None,
            share=False,
            ssr_mode=False,
            max_file_size=f"{MAX_FILE_MB}mb",
            app_kwargs={"middleware": [Middleware(BodyLimits)]},
            enable_monitoring=False,
            footer_links=["api", "settings"],
            theme=THEME,
            css=CSS,
        )
    finally:
        demo.close()


if __name__ == "__main__":
    main()
