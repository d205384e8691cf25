"""The functions behind the page and the API: answers, pictures and the speed."""

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
    """Add an image to the message in the textbox."""
    message = message or {"text": "", "files": []}
    return {**message, "files": [*message["files"], *([image] if image else [])]}


class Endpoints:
    """
    The endpoints. Visitors share nothing but the model.

    Args:
        student (`Student`): The model.
        failures (`Sequence[str]`): A sentence for each encoder that failed to load.
        at_a_time (`int`): How many requests may use the model at once, over all endpoints.
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
        """Answer the next turn on the page, and show errors in place of the answer."""
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
        Answer the next turn of this client's conversation, as a stream of the answer so far.

        Args:
            message: The question as `text` and its images as `files`. Addresses are not opened.
            temperature: 0 takes the likeliest token, a higher value samples.
            top_p: Share of the probability that the sampled tokens make up.
            max_new_tokens: The longest answer in tokens.
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
        Ask one question, with or without an image, and get a stream of the answer so far.

        Args:
            image: The image, or nothing. Tools send a `data:` URL. Addresses are not opened.
            question: The question.
            temperature: 0 takes the likeliest token, a higher value samples.
            top_p: Share of the probability that the sampled tokens make up.
            max_new_tokens: The longest answer in tokens.
        """
        with explained():
            messages = read_conversation([], {"text": question, "files": [image] if image else []})
            yield from self.answer(messages, temperature, top_p, max_new_tokens)

    def see(self, image: str | None, layer: float) -> Any:
        """Return the checkpoint's pictures of one layer, counted from 1."""
        picture = decode(image)
        if layer not in range(1, self.depth + 1):
            raise ValueError(f"Layer {layer:g} is none of this encoder's: 1 to {self.depth}.")
        with self.turns:
            return self.student.visualize(picture, int(layer) - 1)

    def page_pictures(self, image: str | None, layer: float) -> str:
        """Return the pictures as HTML."""
        if not image:
            return "<p>Choose an image above.</p>"
        try:
            with explained():
                return page(self.see(image, layer), int(layer) - 1, self.student.encoders, self.failures)
        except gr.Error as error:
            return f'<p role="alert">{html.escape(error.message)}</p>'

    def pictures(self, image: str, layer: float) -> tuple[list[tuple[Any, str]], list[dict[str, Any]]]:
        """
        Draw what the vision encoder does with an image: the experts, the [CLS] attention, the principal components of
        the features and the distance to other encoders. Each picture has a title. The second result is the share of
        the patches of each expert.

        Args:
            image: The image. Tools send a `data:` URL. Addresses are not opened.
            layer: Layer of the vision encoder, counted from 1. Defaults to the last.
        """
        with explained():
            seen = self.see(image, layer)
            drawn = captioned(seen, int(layer) - 1, self.student.encoders)
            return [(picture, title) for title, _, picture in drawn], shares(seen)

    def experts(self, image: str, layer: float) -> list[dict[str, Any]]:
        """
        Return the share of an image's patches of each expert of the vision encoder.

        Args:
            image: The image. Tools send a `data:` URL. Addresses are not opened.
            layer: Layer of the vision encoder, counted from 1. Defaults to the last.
        """
        with explained():
            return shares(self.see(image, layer))

    def speed(self, image: str, question: str) -> str:
        """Measure the speed, and return it as a sentence."""
        with explained(), self.turns:
            return speed_sentence(self.student, read_conversation([], {"text": question, "files": [image]}))
