"""
OpenAI's chat completions for one loaded model.

The queue, the streaming and the form of the answers come from the handler behind `transformers serve`. That command
itself cannot serve a MoVE-KD checkpoint, opens any address or file that a message names as an image, and loads any
model that a request names. So this module reads and limits the requests by itself.
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
    """
    Limits of one request.

    Args:
        images (`int`, *optional*, defaults to 8): Number of images.
        image_side (`int`, *optional*, defaults to 4096): Longest side of an image in pixels.
        image_bytes (`int`, *optional*, defaults to 20 MiB): Size of an image file.
        prompt_characters (`int`, *optional*, defaults to 100,000): Characters of all texts together.
        new_tokens (`int`, *optional*, defaults to 1024): Longest answer, and the default length.
        image_urls (`bool`, *optional*, defaults to `False`): Whether to download images from http(s) addresses.
            Clients can then make the server connect to any host that it reaches.
    """

    images: int = 8
    image_side: int = 4096
    image_bytes: int = 20 * 2**20
    prompt_characters: int = 100_000
    new_tokens: int = 1024
    image_urls: bool = False


class _Fields(BaseModel):
    """Refuses unknown fields unless they are null, because an ignored option would mislead the client."""

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
    detail: Literal["auto", "low", "high"] = "auto"  # has no effect


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
    """The supported fields of a chat completion. `n`, `logprobs` and the penalties must have their defaults."""

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
    stream_options: dict[str, Any] | None = None  # has no effect: a stream always ends with the usage
    user: str | None = None


def read_image(url: str, limits: Limits) -> Image.Image:
    """Decode the image of a data URL, or of an http(s) address if `limits.image_urls`."""
    scheme = url[:8].partition(":")[0].lower()
    if scheme == "data":
        header, _, payload = url.partition(",")
        if not header.endswith(";base64"):
            raise ValueError("a data URL begins with data:image/png;base64, or another image type")
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
            # `timeout` limits each read only, and a slow download would block all requests.
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
    """Stops the generation of an answer that no client waits for, by an error in its thread."""

    def __init__(self, handler: "ChatHandler") -> None:
        self.handler, self.left = handler, threading.Event()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if self.left.is_set():
            raise HTTPException(499, "The client left.")
        if self.handler.stopping():
            raise HTTPException(503, "The server is stopping.")
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class Streamed:
    """Wraps the model for streaming, where the library logs no error and sends its text to the client."""

    def __init__(self, model: MoveKDForConditionalGeneration) -> None:
        self.model, self.config = model, model.config

    def generate(self, **kwargs: Any) -> torch.Tensor:
        try:
            return self.model.generate(**kwargs)
        except (_GenerationCancelled, HTTPException):
            raise
        except Exception:
            logger.exception("A streamed answer failed.")
            raise RuntimeError(FAILED) from None


class ChatHandler(ChatCompletionHandler):
    """
    Answers the requests for one model, one after another.

    Args:
        name (`str`): Name of the model in requests.
        model (`MoveKDForConditionalGeneration`): The model.
        processor (`ProcessorMixin`): Its processor.
        limits (`Limits`, *optional*): Limits of one request.
    """

    # Set by the server: returns whether to stop the current generation.
    stopping: Callable[[], bool] = staticmethod(lambda: False)

    def __init__(
        self,
        name: str,
        model: MoveKDForConditionalGeneration,
        processor: ProcessorMixin,
        limits: Limits = Limits(),
    ) -> None:
        super().__init__(model_manager=None, generation_state=GenerationState())  # no other models are loaded
        self.name, self.model, self.processor, self.limits = name, model, processor, limits
        # Requests are prepared one at a time to bound the memory for images. Padding changes a tokenizer's state, so
        # that this thread needs another tokenizer than the thread that decodes.
        self._preparing = asyncio.Lock()
        self._own_processor = copy.deepcopy(processor)

    async def handle_request(self, request: ChatRequest, request_id: str, connection: Request) -> Response:
        """Return the answer or a stream of it. The generation stops when the client leaves."""
        if request.model != self.name:
            raise HTTPException(404, f"There is no model {request.model[:200]!r}; this server has {self.name!r}.")
        try:
            async with self._preparing:
                inputs, generation = await asyncio.to_thread(self._prepare, request)
        except (ValueError, TemplateError) as error:
            raise HTTPException(400, str(error)) from error
        manager = self.generation_state.get_manager(self.name)
        if request.seed is not None:
            # Queued, so that no other request runs between the seed and its generation.
            manager.submit(set_torch_seed, request.seed)
        # The library passes the inputs to `generate`, so other arguments of `generate` travel with them.
        abandoned = Abandoned(self)
        inputs["stopping_criteria"] = StoppingCriteriaList([abandoned])
        model = Streamed(self.model) if request.stream else self.model
        arguments = (request_id, model, self.processor, self.name, inputs, generation)
        if request.stream:  # the library ends a stream when the client leaves
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
        """Convert messages to the form that chat templates take, and decode their images."""
        parts = [part for message in messages for part in message.content]
        texts = [part.text for part in parts if isinstance(part, TextPart)]
        text = "".join(texts)  # templates join the parts of a message, too
        if len(text) > self.limits.prompt_characters:
            raise ValueError(f"The messages have {len(text)} characters; at most {self.limits.prompt_characters}.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"A text is not valid Unicode ({error.reason}).") from error
        if (token := self.processor.image_token) in text:
            raise ValueError(f"A text contains {token}. Send images as parts of type 'image_url'.")
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
                    raise ValueError(f"A message of the {message.role} has an image; only the user's may.")
                read += 1
                try:
                    content.append({"type": "image", "image": read_image(part.image_url.url, self.limits)})
                except ValueError as error:
                    raise ValueError(f"Image {read} cannot be used: {error}.") from error
            role = "system" if message.role == "developer" else message.role
            converted.append({"role": role, "content": content})
        return converted

    def _generation(self, request: ChatRequest, inputs: dict[str, Any]) -> GenerationConfig:
        """Override the checkpoint's generation settings by those of the request."""
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
            # Scores overflow at lower temperatures, and on a GPU every later request would then fail.
            generation.temperature = max(request.temperature or 1.0, 0.01)
            generation.top_p = request.top_p or 1.0
        return generation


async def _wait_until_left(connection: Request, left: threading.Event) -> None:
    while (await connection.receive())["type"] != "http.disconnect":
        pass
    left.set()


def refusal(status: int, message: str) -> JSONResponse:
    """Return an error in OpenAI's format."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": None}}, status)


def build_app(handler: ChatHandler, allowed_hosts: Sequence[str] = ("*",)) -> FastAPI:
    """
    Build the server with `/v1/models`, `/v1/chat/completions` and `/health`.

    Args:
        handler (`ChatHandler`): Answers the requests.
        allowed_hosts (`Sequence[str]`, *optional*, defaults to `("*",)`): Host names in requests. A server for its own
            machine should allow only local names, or a web page could reach it by DNS rebinding.
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

    metadata = {"id": handler.name, "object": "model", "created": 0, "owned_by": "movekd"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [metadata]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != handler.name:
            raise HTTPException(404, f"There is no model {name[:200]!r}; this server has {handler.name!r}.")
        return metadata

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    return app
