"""
OpenAI's chat completions over one loaded model, by the handler behind `transformers serve`.

That command itself cannot serve a MoVE-KD checkpoint (it looks the class up in transformers), opens any address or
file that a message names as an image, and loads whatever model is asked for. Its queue, its streaming and its answers
are used here; what comes in is read by this module, within `Limits`. Requests are answered one after another.

Needs fastapi, uvicorn and openai: `pip install "movekd[serve]"`.
"""

import asyncio
import base64
import copy
import logging
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.client import HTTPException as HTTPClientError
from typing import Annotated, Any, Literal
from urllib.request import Request as URLRequest
from urllib.request import urlopen

import torch
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from jinja2 import TemplateError
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from transformers import GenerationConfig, ProcessorMixin, StoppingCriteria, StoppingCriteriaList
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.utils import GenerationState, _GenerationCancelled, set_torch_seed

from .images import decode_image
from .inference import check_length, longest_context, prepare
from .modeling_movekd import MoveKDForConditionalGeneration


logger = logging.getLogger(__name__)

FAILED = "The server failed to answer; its log says why."
MAX_REQUEST_BYTES = 32 * 2**20
MAX_PARTS = 1000  # messages of a request, and parts of a message
DOWNLOAD_SECONDS = 10


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    Attributes:
        images: Number of images in all its messages.
        image_side: Longest side of an image in pixels.
        image_bytes: Size of an image's file.
        prompt_characters: Length of all texts, checked before they are tokenised; in tokens the language model's
            positions are the limit.
        new_tokens: Longest answer, which is also that of a request that names none.
        image_urls: Download images from http(s) addresses. The server then connects wherever a client says, to hosts
            that only the server can reach too.
    """

    images: int = 8
    image_side: int = 4096
    image_bytes: int = 20 * 2**20
    prompt_characters: int = 100_000
    new_tokens: int = 1024
    image_urls: bool = False


class _Fields(BaseModel):
    """Refuses a field it does not know, unless it is null: an option that is dropped in silence misleads."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        return (
            {key: value for key, value in values.items() if value is not None} if isinstance(values, dict) else values
        )


class TextPart(_Fields):
    type: Literal["text"]
    text: str


class ImageURL(_Fields):
    url: str
    detail: Literal["auto", "low", "high"] = "auto"  # of no effect: the checkpoint's processor decides


class ImagePart(_Fields):
    type: Literal["image_url"]
    image_url: ImageURL


class Message(_Fields):
    role: Literal["system", "developer", "user", "assistant"]
    content: list[Annotated[TextPart | ImagePart, Field(discriminator="type")]] = Field(max_length=MAX_PARTS)

    @field_validator("content", mode="before")
    @classmethod
    def _parts(cls, content: Any) -> Any:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content


class ChatRequest(_Fields):
    """The fields of a chat completion that are served. Of `n`, penalties and `logprobs` only what changes nothing."""

    model: str
    messages: list[Message] = Field(min_length=1, max_length=MAX_PARTS)
    stream: bool = False
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    n: Literal[1] = 1
    logprobs: Literal[False] = False
    frequency_penalty: float = Field(0, ge=0, le=0)
    presence_penalty: float = Field(0, ge=0, le=0)
    stream_options: dict[str, Any] | None = None  # a stream always ends with the usage
    user: str | None = None


def read_image(url: str, limits: Limits) -> Image.Image:
    """
    The image of a data URL, or of an address if `limits.image_urls`.

    Raises:
        ValueError: with the reason, if it may not be read, is too large or is no image.
    """
    scheme = url[:8].partition(":")[0].lower()
    if scheme == "data":
        header, _, payload = url.partition(",")
        if not header.endswith(";base64"):
            raise ValueError("a data URL begins with data:image/png;base64, (or another type), then the bytes")
        if len(payload) * 3 // 4 > limits.image_bytes:
            raise ValueError(f"{len(payload) * 3 // 4} bytes; at most {limits.image_bytes} are read")
        try:
            content = base64.b64decode(payload, validate=True)
        except ValueError as error:
            raise ValueError(f"not base64 ({error})") from error
    elif scheme in ("http", "https") and limits.image_urls:
        content = _download(url, limits.image_bytes)
    else:
        ways = "a data URL (data:image/png;base64,...)" + (" or an http(s) address" if limits.image_urls else "")
        raise ValueError(f"an image comes as {ways}; this server opens no other addresses and no files")
    return decode_image({"bytes": content}, max_side=limits.image_side)


def _download(url: str, most: int) -> bytes:
    content, end = b"", time.monotonic() + DOWNLOAD_SECONDS
    try:
        with urlopen(URLRequest(url, headers={"User-Agent": "movekd"}), timeout=DOWNLOAD_SECONDS) as response:
            # The timeout is of each read: what comes in drops would hold up all requests
            while len(content) <= most and (part := response.read1()):
                content += part
                if time.monotonic() > end:
                    raise TimeoutError(f"it took more than {DOWNLOAD_SECONDS} seconds")
    except (OSError, ValueError, HTTPClientError) as error:
        raise ValueError(f"the address cannot be read ({error})") from error
    if len(content) > most:
        raise ValueError(f"more than {most} bytes are not read")
    return content


class Abandoned(StoppingCriteria):
    """Ends an answer that nobody waits for, by an error on the thread that generates."""

    def __init__(self, handler: "ChatHandler") -> None:
        self.handler, self.left = handler, threading.Event()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if self.left.is_set():
            raise HTTPException(499, "The client left.")
        if self.handler.stopping():
            raise HTTPException(503, "The server is being stopped.")
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class Streamed:
    """The model as a stream asks it, where the library logs no failure and sends the failure's text as it is."""

    def __init__(self, model: MoveKDForConditionalGeneration) -> None:
        self.model, self.config = model, model.config

    def generate(self, **kwargs: Any) -> torch.Tensor:
        """
        As the model's.

        Raises:
            RuntimeError: with a sentence that gives nothing away, for a failure, which is logged.
        """
        try:
            return self.model.generate(**kwargs)
        except (_GenerationCancelled, HTTPException):
            raise
        except Exception:
            logger.exception("An answer has failed while it was streamed.")
            raise RuntimeError(FAILED) from None


class ChatHandler(ChatCompletionHandler):
    """
    Answers the requests for one model.

    Args:
        name: What clients call the model.

    Attributes:
        stopping: Says whether to give up what is being generated. Never, by default.
    """

    stopping: Callable[[], bool] = staticmethod(lambda: False)

    def __init__(
        self,
        name: str,
        model: MoveKDForConditionalGeneration,
        processor: ProcessorMixin,
        limits: Limits = Limits(),
    ) -> None:
        super().__init__(model_manager=None, generation_state=GenerationState())  # the one model is there already
        self.name, self.model, self.processor, self.limits = name, model, processor, limits
        # Requests are prepared one at a time, which bounds the memory for images, and with a tokenizer apart from the
        # one that decodes on another thread meanwhile: padding changes a tokenizer's state
        self._preparing = asyncio.Lock()
        self._own_processor = copy.deepcopy(processor)

    async def handle_request(self, request: ChatRequest, request_id: str, connection: Request) -> Response:
        """
        The answer, or the stream of it. It is given up when the client leaves.

        Raises:
            HTTPException: 404 for another model, 400 with a sentence for what cannot be answered.
        """
        if request.model != self.name:
            raise HTTPException(404, f"There is no model {request.model[:200]!r}; this server has {self.name!r}.")
        try:
            async with self._preparing:
                inputs, generation = await asyncio.to_thread(self._prepare, request)
        except (ValueError, TemplateError) as error:
            raise HTTPException(400, str(error)) from error
        manager = self.generation_state.get_manager(self.name)
        if request.seed is not None:
            # The same queue, so that no other request comes between the seed and what it is for
            manager.submit(set_torch_seed, request.seed)
        # What goes to `generate` besides its configuration goes with the inputs
        abandoned = Abandoned(self)
        inputs["stopping_criteria"] = StoppingCriteriaList([abandoned])
        model = Streamed(self.model) if request.stream else self.model
        arguments = (request_id, model, self.processor, self.name, inputs, generation)
        if request.stream:  # which the library ends when the client leaves
            return self._streaming(*arguments, gen_manager=manager)
        watch = asyncio.create_task(_wait_until_left(connection, abandoned.left))
        try:
            return await self._non_streaming(*arguments, gen_manager=manager)
        finally:
            watch.cancel()

    def _prepare(self, request: ChatRequest) -> tuple[dict[str, Any], GenerationConfig]:
        inputs = prepare(self._own_processor, [self._messages(request.messages)], self.model.device)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        return inputs, self._generation(request, inputs)

    def _messages(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """In the form chat templates take, with the images decoded."""
        parts = [part for message in messages for part in message.content]
        texts = [part.text for part in parts if isinstance(part, TextPart)]
        text = "".join(texts)  # as templates join the parts of a message
        if len(text) > self.limits.prompt_characters:
            raise ValueError(f"The messages have {len(text)} characters; at most {self.limits.prompt_characters}.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"A text is not valid Unicode ({error.reason}).") from error
        if (token := self.processor.image_token) in text:
            raise ValueError(f"A text contains {token}; send images as parts of type 'image_url'.")
        if (images := len(parts) - len(texts)) > self.limits.images:
            raise ValueError(f"The messages have {images} images; at most {self.limits.images}.")
        read, converted = 0, []
        for message in messages:
            content: list[dict[str, Any]] = []
            for part in message.content:
                if isinstance(part, TextPart):
                    content.append({"type": "text", "text": part.text})
                    continue
                if message.role != "user":
                    raise ValueError(f"A message of the {message.role} holds an image; only the user's may.")
                read += 1
                try:
                    content.append({"type": "image", "image": read_image(part.image_url.url, self.limits)})
                except ValueError as error:
                    raise ValueError(f"Image {read} cannot be used: {error}.") from error
            role = "system" if message.role == "developer" else message.role
            converted.append({"role": role, "content": content})
        return converted

    def _generation(self, request: ChatRequest, inputs: dict[str, Any]) -> GenerationConfig:
        """The checkpoint's own settings, except for what the request says. A temperature above 0 samples."""
        asked = request.max_completion_tokens or request.max_tokens
        if asked is not None and asked > self.limits.new_tokens:
            raise ValueError(f"max_tokens is {asked}; this server's answers have at most {self.limits.new_tokens}.")
        check_length(self.model, inputs, asked or 1)
        if asked is None:
            longest = longest_context(self.model)
            room = self.limits.new_tokens if longest is None else longest - inputs["input_ids"].shape[1]
            asked = min(self.limits.new_tokens, room)
        generation = copy.deepcopy(self.model.generation_config)
        generation.max_new_tokens, generation.max_length = asked, None
        if request.temperature is not None or request.top_p is not None:
            generation.do_sample = request.temperature != 0
            # Below, the scores overflow, which on a GPU no later request survives
            generation.temperature = max(request.temperature or 1.0, 0.01)
            generation.top_p = request.top_p or 1.0
        return generation


async def _wait_until_left(connection: Request, left: threading.Event) -> None:
    while (await connection.receive())["type"] != "http.disconnect":
        pass
    left.set()


def refusal(status: int, message: str) -> JSONResponse:
    """An error in the form OpenAI's clients read."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": None}}, status)


def build_app(handler: ChatHandler, allowed_hosts: Sequence[str] = ("*",)) -> FastAPI:
    """
    `/v1/models`, `/v1/chat/completions` and `/health`.

    Args:
        allowed_hosts: Names by which clients may address the server. On a machine of one's own these are its own names
            alone, or else a web page in its browser could reach the server under another.
    """
    app = FastAPI(openapi_url=None, max_body_size=MAX_REQUEST_BYTES)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(allowed_hosts), www_redirect=False)

    @app.exception_handler(StarletteHTTPException)
    async def refuse(request: Request, error: StarletteHTTPException) -> JSONResponse:
        return refusal(error.status_code, str(error.detail))

    @app.exception_handler(RequestValidationError)
    async def refuse_fields(request: Request, error: RequestValidationError) -> JSONResponse:
        problems = []
        for problem in error.errors()[:3]:
            place = ".".join(str(step) for step in problem["loc"][1:])[:100] or "The request"
            unknown = problem["type"] == "extra_forbidden"
            problems.append(f"{place}: {'not a field that is served here' if unknown else problem['msg']}")
        return refusal(400, "; ".join(problems) + ".")

    @app.exception_handler(Exception)
    async def fail(request: Request, error: Exception) -> JSONResponse:
        return refusal(500, FAILED)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: ChatRequest, connection: Request) -> Response:
        return await handler.handle_request(request, f"chatcmpl-{uuid.uuid4().hex}", connection)

    facts = {"id": handler.name, "object": "model", "created": 0, "owned_by": "movekd"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [facts]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != handler.name:
            raise HTTPException(404, f"There is no model {name[:200]!r}; this server has {handler.name!r}.")
        return facts

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    return app
