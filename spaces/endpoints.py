"""What the page and programs can ask for: answers, pictures and the speed."""

import html
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr
from about import speed_sentence
from drawing import captioned, page, shares
from errors import NOT_ANSWERED, explained
from student import Student
from uploads import decode, read_conversation


def add_picture(image: str | None, message: dict[str, Any] | None) -> dict[str, Any]:
    """What is being written, with one more image."""
    message = message or {"text": "", "files": []}
    return {**message, "files": [*message["files"], *([image] if image else [])]}


class Endpoints:
    """
    Nothing is shared between visitors but the model.

    Args:
        failures: A sentence for each encoder that could not be loaded.
        at_a_time: How many may use the model at once, all endpoints together, as they share one memory.
    """

    def __init__(self, student: Student, failures: Sequence[str], at_a_time: int) -> None:
        self.student, self.failures = student, failures
        self.depth: int = student.model.config.vision_config.num_hidden_layers
        self.context: int = student.context_length or 4096
        self.turns = threading.BoundedSemaphore(at_a_time)

    def answer(
        self, messages: Sequence[dict[str, Any]], temperature: float, top_p: float, max_new_tokens: float
    ) -> Iterator[str]:
        if not 0 <= temperature <= 2 or not 0 < top_p <= 1 or not 1 <= max_new_tokens <= self.context:
            raise ValueError(
                f"Temperature is {temperature} (0 to 2), top-p {top_p} (above 0, up to 1) and the longest answer "
                f"{max_new_tokens} tokens (1 to {self.context}); one of them is out of its range."
            )
        if self.student.unknown_words(messages[-1]["content"][-1]["text"]):
            gr.Warning("Some of these words are not in the model's vocabulary; it does not see them.")
        with self.turns:
            yield from self.student.stream(messages, int(max_new_tokens), float(temperature), float(top_p))

    def page_turn(
        self,
        message: dict[str, Any],
        history: list[dict[str, Any]],
        temperature: float,
        top_p: float,
        max_new_tokens: float,
    ) -> Iterator[str | gr.ChatMessage]:
        """The next turn on the page, where a refusal takes the answer's place."""
        try:
            with explained():
                yield from self.answer(read_conversation(history, message), temperature, top_p, max_new_tokens)
        except gr.Error as error:
            yield gr.ChatMessage(content=error.message, metadata={"title": NOT_ANSWERED})

    def chat(
        self,
        message: dict[str, Any],
        history: list[dict[str, Any]],
        temperature: float = 0.0,
        top_p: float = 1.0,
        max_new_tokens: float = 64,
    ) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """
        The next turn of this client's conversation. Streams the answer so far.

        Args:
            message: `text`, the question, and `files`, images for it (no addresses).
            temperature: 0 takes the likeliest token, more draws.
            top_p: Of the likeliest tokens, those that make up this share are drawn from.
            max_new_tokens: The longest answer, in tokens.
        """
        with explained():
            messages = read_conversation(history, message)
            asked = {"role": "user", "content": [*({"path": path} for path in message["files"]), message["text"]]}
            for text in self.answer(messages, temperature, top_p, max_new_tokens):
                yield text, [*history, asked, {"role": "assistant", "content": text}]

    def ask(
        self,
        image: str | None = None,
        question: str | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        max_new_tokens: float = 64,
    ) -> Iterator[str]:
        """
        Ask one question, about an image or without one. Streams the answer so far.

        Args:
            image: The image, or nothing. From a tool a `data:` URL; addresses are not opened.
            question: What to ask.
            temperature: 0 takes the likeliest token, more draws.
            top_p: Of the likeliest tokens, those that make up this share are drawn from.
            max_new_tokens: The longest answer, in tokens.
        """
        with explained():
            messages = read_conversation([], {"text": question, "files": [image] if image else []})
            yield from self.answer(messages, temperature, top_p, max_new_tokens)

    def see(self, image: str | None, layer: float) -> Any:
        """The checkpoint's own pictures of one layer, counted from 1."""
        picture = decode(image)
        if layer not in range(1, self.depth + 1):
            raise ValueError(f"Layer {layer:g} is none of this encoder's: 1 to {self.depth}.")
        with self.turns:
            return self.student.visualize(picture, int(layer) - 1)

    def page_pictures(self, image: str | None, layer: float) -> str:
        """The pictures as a part of the page."""
        if not image:
            return "<p>Choose an image above.</p>"
        try:
            with explained():
                return page(self.see(image, layer), int(layer) - 1, self.student.encoders, self.failures)
        except gr.Error as error:
            return f'<p role="alert">{html.escape(error.message)}</p>'

    def pictures(self, image: str, layer: float) -> tuple[list[tuple[Any, str]], list[dict[str, Any]]]:
        """
        Look into the vision encoder at one image: pictures of the experts, the [CLS] attention, the features'
        principal components and the distance to other encoders, each with a title; and each expert's share of the
        patches.

        Args:
            image: The image. From a tool a `data:` URL; addresses are not opened.
            layer: Layer of the vision encoder, counted from 1; by default the last.
        """
        with explained():
            seen = self.see(image, layer)
            drawn = captioned(seen, int(layer) - 1, self.student.encoders)
            return [(picture, title) for title, _, picture in drawn], shares(seen)

    def experts(self, image: str, layer: float) -> list[dict[str, Any]]:
        """
        Which share of an image's patches each expert of the vision encoder took.

        Args:
            image: The image. From a tool a `data:` URL; addresses are not opened.
            layer: Layer of the vision encoder, counted from 1; by default the last.
        """
        with explained():
            return shares(self.see(image, layer))

    def speed(self, image: str, question: str) -> str:
        """A measurement made now, as a sentence."""
        with explained(), self.turns:
            return speed_sentence(self.student, read_conversation([], {"text": question, "files": [image]}))
