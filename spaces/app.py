"""
A checkpoint to talk with, and to look into: a Gradio Space as it stands, for ZeroGPU, a GPU or a CPU.

    python spaces/app.py [--port 7860] [--host 0.0.0.0] [--mcp]

The model is the one that the environment names (`MODEL_ID`, `MODEL_REVISION`), else the demo's in `outputs/demo`,
where `accelerate launch train/sft.py` writes it. README.md has all variables and the endpoints for programs.
"""

import argparse
import html
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zero_gpu import ON_ZERO_GPU  # before torch


# isort: split
import gradio as gr
from about import about, speed_sentence
from drawing import captioned, page, shares
from encoders import CLONE, Encoder, load_encoders
from student import Student, load_student
from uploads import KEPT_SECONDS, MAX_FILE_MB, NOT_ANSWERED, decode, read_conversation


HERE = Path(__file__).resolve().parent
DEMO = CLONE / "outputs" / "demo"
EXAMPLES = [
    ("scene_1.png", "How many objects are there?"),
    ("scene_2.png", "What shape is the cyan object?"),
    ("scene_3.png", "Is there a red circle?"),
]
THEME = gr.themes.Soft(
    primary_hue="indigo",
    secondary_hue="amber",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
)
CSS = (HERE / "style.css").read_text(encoding="utf-8")


@contextmanager
def explained() -> Iterator[None]:
    """Whatever goes wrong, as one sentence to the visitor; of what is our own fault the place goes to the log."""
    try:
        yield
    except gr.Error:
        raise
    except ValueError as error:
        raise gr.Error(str(error), duration=None, title="Not answered", print_exception=False) from None
    except Exception as error:
        # The text of an error may hold what a visitor wrote
        frame = traceback.extract_tb(error.__traceback__)[-1]
        print(f"{type(error).__name__} at {frame.filename}:{frame.lineno}", file=sys.stderr, flush=True)
        sentence = (
            f"Something failed here ({type(error).__name__}). Try again, with a smaller image or a new question."
        )
        raise gr.Error(sentence, duration=None, title="Not answered", print_exception=False) from None


def add_picture(image: str | None, message: dict[str, Any] | None) -> dict[str, Any]:
    """What is being written, with one more image."""
    message = message or {"text": "", "files": []}
    return {**message, "files": [*message["files"], *([image] if image else [])]}


def examples(names: Sequence[tuple[str, str]] = EXAMPLES) -> list[tuple[str, str]]:
    """Path and question of each."""
    return [(str(HERE / "examples" / name), question) for name, question in names]


def build(student: Student, encoders: Sequence[Encoder], failures: Sequence[str], at_a_time: int) -> gr.Blocks:
    """The page and its endpoints; nothing is shared between visitors but the model."""
    turns = threading.BoundedSemaphore(at_a_time)  # all endpoints together, as they share one memory
    depth = student.model.config.vision_config.num_hidden_layers
    context = student.context_length or 4096

    def answer(
        messages: Sequence[dict[str, Any]], temperature: float, top_p: float, max_new_tokens: int
    ) -> Iterator[str]:
        if not 0 <= temperature <= 2 or not 0 < top_p <= 1 or not 1 <= max_new_tokens <= context:
            raise ValueError(
                f"Temperature is {temperature} (0 to 2), top-p {top_p} (above 0, up to 1) and the length "
                f"{max_new_tokens} (1 to {context}); one of them is out of its range."
            )
        if student.unknown_words(messages[-1]["content"][-1]["text"]):
            gr.Warning("Some of these words are not in the model's vocabulary; it does not see them.")
        with turns:
            yield from student.stream(messages, int(max_new_tokens), float(temperature), float(top_p))

    def chat(
        message: dict[str, Any], history: list[dict[str, Any]], temperature: float, top_p: float, max_new_tokens: int
    ) -> Iterator[str | gr.ChatMessage]:
        """The next turn on the page, where a refusal takes the answer's place."""
        try:
            with explained():
                yield from answer(read_conversation(history, message), temperature, top_p, max_new_tokens)
        except gr.Error as error:
            yield gr.ChatMessage(content=error.message, metadata={"title": NOT_ANSWERED})

    def converse(
        message: dict[str, Any],
        history: list[dict[str, Any]],
        temperature: float = 0.0,
        top_p: float = 1.0,
        max_new_tokens: int = 64,
    ) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """
        The next turn of this client's conversation. Streams the answer so far.

        Args:
            message: `text`, the question, and `files`, images for it.
            temperature: 0 takes the likeliest token, more draws.
            top_p: Of the likeliest tokens, those that make up this share are drawn from.
            max_new_tokens: The longest answer, in tokens.
        """
        with explained():
            asked = {"role": "user", "content": [*({"path": path} for path in message["files"]), message["text"]]}
            messages = read_conversation(history, message)
            for text in answer(messages, temperature, top_p, max_new_tokens):
                yield text, [*history, asked, {"role": "assistant", "content": text}]

    def ask(
        image: str | None, question: str, temperature: float = 0.0, top_p: float = 1.0, max_new_tokens: int = 64
    ) -> Iterator[str]:
        """
        Ask one question, about an image or without one. Streams the answer so far.

        Args:
            image: The image, or nothing.
            question: What to ask.
            temperature: 0 takes the likeliest token, more draws.
            top_p: Of the likeliest tokens, those that make up this share are drawn from.
            max_new_tokens: The longest answer, in tokens.
        """
        with explained():
            message = {"text": question, "files": [image] if image else []}
            yield from answer(read_conversation([], message), temperature, top_p, max_new_tokens)

    def see(image: str | None, layer: float) -> Any:
        picture = decode(image)
        if not 1 <= layer <= depth:
            raise ValueError(f"Layer {layer:g} is none of this encoder's: 1 to {depth}.")
        with turns:
            return student.visualize(picture, int(layer) - 1, encoders)

    def look(image: str | None, layer: float) -> str:
        """The pictures as a part of the page."""
        if not image:
            return "<p>Choose an image above.</p>"
        try:
            with explained():
                return page(see(image, layer), int(layer) - 1, encoders, failures)
        except gr.Error as error:
            return f'<p role="alert">{html.escape(error.message)}</p>'

    def pictures(image: str | None, layer: float = depth) -> tuple[list[tuple[Any, str]], list[dict[str, Any]]]:
        """
        Look into the vision encoder at one image: pictures of the experts, the [CLS] attention, the features'
        principal components and the distance to other encoders, each with a title; and each expert's share of the
        patches.

        Args:
            image: The image.
            layer: Layer of the vision encoder, counted from 1; by default the last.
        """
        with explained():
            seen, index = see(image, layer), int(layer) - 1
            return [(drawn, title) for title, _, drawn in captioned(seen, index, encoders)], shares(seen)

    def experts(image: str | None, layer: float = depth) -> list[dict[str, Any]]:
        """
        Which share of an image's patches each expert of the vision encoder took.

        Args:
            image: The image.
            layer: Layer of the vision encoder, counted from 1; by default the last.
        """
        with explained():
            return shares(see(image, layer))

    def measure() -> str:
        with explained(), turns:
            path, question = examples()[0]
            return speed_sentence(student, read_conversation([], {"text": question, "files": [path]}))

    measured = {"speed": "Speed: not measured yet on this machine."}
    if not ON_ZERO_GPU:

        def measure_first() -> None:
            try:
                measured["speed"] = measure()
            except gr.Error as error:
                measured["speed"] = f"Speed could not be measured: {error.message}"

        measured["speed"] = "Speed: being measured; press the button to see it."
        threading.Thread(target=measure_first, name="measure", daemon=True).start()

    with gr.Blocks(
        title="MoVE-KD", analytics_enabled=False, delete_cache=(60, KEPT_SECONDS), fill_width=False
    ) as demo:
        gr.Markdown(
            "# MoVE-KD\n"
            "A vision-language model whose one encoder was distilled from several. Ask it about images, and see "
            "which of its experts looks at what. [Paper](https://arxiv.org/abs/2501.01709)",
            elem_id="header",
        )
        words = len(student.processor.tokenizer)
        if words < 1000:
            gr.Markdown(
                f"**A toy model is loaded.** It knows {words} words and pictures of coloured shapes like the "
                "examples: ask it what colour or shape something is, whether there is one, or how many there are.",
                elem_id="note",
            )
        settings: list[Any] = [
            gr.Slider(0, 2, 0, step=0.05, label="Temperature", info="0 takes the likeliest word", render=False),
            gr.Slider(0.05, 1, 1, step=0.05, label="Top-p", info="for a temperature above 0", render=False),
            gr.Slider(
                1,
                min(1024, context // 2),
                min(256, context // 4),
                step=1,
                label="Longest answer, tokens",
                render=False,
            ),
        ]
        with gr.Tabs():
            with gr.Tab("Chat", id="chat"):
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
                    chat,
                    multimodal=True,
                    chatbot=gr.Chatbot(
                        label="Conversation", height="55vh", min_height=320, buttons=["copy"], elem_id="chatbot"
                    ),
                    textbox=textbox,
                    additional_inputs=settings,
                    additional_inputs_accordion=gr.Accordion("Settings", open=False, render=False),
                    examples=[[{"text": question, "files": [path]}] for path, question in examples()],
                    cache_examples=False,
                    concurrency_limit=at_a_time,
                    api_name="page",
                    api_visibility="private",
                )
                with gr.Accordion("Camera", open=False):
                    camera = gr.Image(
                        type="filepath", label="Take a picture for your next question", sources=["webcam"]
                    )
                    camera.input(add_picture, [camera, textbox], textbox, api_visibility="private", queue=False)
            with gr.Tab("What the encoder sees", id="encoder"):
                with gr.Row():
                    picture = gr.Image(
                        type="filepath",
                        label="Image",
                        sources=["upload", "webcam", "clipboard"],
                        height=260,
                        value=examples()[0][0],
                        elem_id="picture",
                    )
                    with gr.Column():
                        layer = gr.Slider(
                            1, depth, depth, step=1, label="Layer", info=f"{depth}, the last, feeds the language model"
                        )
                        gr.Examples([[path] for path, _ in examples()], [picture], label="Examples")
                first = "" if ON_ZERO_GPU else look(*examples()[0][:1], depth)
                drawn = gr.HTML(first, label="Pictures", elem_id="pictures", padding=False)
                # As the visitor sent it: `gr.Image` would open it before `decode` can refuse it with a sentence
                sent = gr.File(examples()[0][0], visible="hidden")
                settled: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": at_a_time}
                picture.change(None, picture, sent, js="(image) => image").then(look, [sent, layer], drawn, **settled)
                layer.change(look, [sent, layer], drawn, trigger_mode="always_last", **settled)
            with gr.Tab("About", id="about"):
                gr.Markdown(about(student, encoders), elem_id="about")
                speed = gr.Markdown(measured["speed"], elem_id="speed")
                button = gr.Button("Measure the speed now")
                button.click(measure, None, speed, api_name="speed", concurrency_limit=1)
                demo.load(lambda: measured["speed"], None, speed, api_visibility="private", queue=False)
        with gr.Row(visible=False):  # for programs
            said = gr.MultimodalTextbox(label="message", file_count="multiple")
            conversation = gr.State([])
            asked = [gr.File(label="image"), gr.Textbox(label="question")]
            knobs = [
                gr.Number(0, label="temperature"),
                gr.Number(1, label="top_p"),
                gr.Number(min(64, context // 4), label="max_new_tokens"),
            ]
            shown = [gr.File(label="image"), gr.Number(depth, label="layer")]
            outputs = [gr.Textbox(), gr.Gallery(format="png"), gr.JSON(), gr.JSON()]
            limits: dict[str, Any] = {"concurrency_limit": at_a_time}
            gr.Button().click(
                converse, [said, conversation, *knobs], [outputs[0], conversation], api_name="chat", **limits
            )
            gr.Button().click(ask, [*asked, *knobs], outputs[0], api_name="ask", **limits)
            gr.Button().click(pictures, shown, outputs[1:3], api_name="pictures", **limits)
            gr.Button().click(experts, shown, outputs[3], api_name="experts", **limits)
    return demo


def find_student() -> Student:
    """
    Raises:
        ValueError: if no checkpoint is named and the clone has none, or the named one is of no use.
    """
    model_id = os.environ.get("MODEL_ID")
    if not model_id and not (DEMO / "config.json").is_file():
        raise ValueError(
            "There is no model to show. In a clone, train the demo first (`accelerate launch train/sft.py`, a few "
            "minutes; it writes outputs/demo); or name a checkpoint by MODEL_ID and MODEL_REVISION."
        )
    return load_student(model_id or str(DEMO), os.environ.get("MODEL_REVISION"))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, help="by default the first free one from 7860 on")
    parser.add_argument("--host", help="address to listen at; by default this machine alone")
    parser.add_argument(
        "--mcp", action="store_true", help="serve the endpoints as tools too (MCP, at /gradio_api/mcp)"
    )
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    # A folder of this run's own, which nobody else may read and which ends with it
    with tempfile.TemporaryDirectory(prefix="movekd-", ignore_cleanup_errors=True) as cache:
        os.environ["GRADIO_TEMP_DIR"] = cache
        try:
            student = find_student()
            at_a_time = int(os.environ.get("CONCURRENCY", "1"))
            demo = build(student, *load_encoders(student), at_a_time)
        except (ValueError, OSError) as error:
            raise SystemExit(f"error: {error}") from None
        demo.queue(max_size=int(os.environ.get("QUEUE_SIZE", "20")), default_concurrency_limit=at_a_time)
        try:
            demo.launch(
                server_name=options.host,
                server_port=options.port,
                mcp_server=options.mcp or None,
                share=False,
                ssr_mode=False,
                max_file_size=f"{MAX_FILE_MB}mb",
                enable_monitoring=False,
                footer_links=["api", "settings"],
                theme=THEME,
                css=CSS,
            )
        finally:
            demo.close()


if __name__ == "__main__":
    main()
