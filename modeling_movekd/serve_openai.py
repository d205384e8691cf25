"""
OpenAI's chat completions for one loaded model.

The queue, the streaming and the form of the answers come from the handler behind `transformers serve`. That command
itself cannot serve a MoVE-KD checkpoint, opens any address or file that a message names as an image, and loads any
model that a request names. So this module reads and limits the requests by itself.
"""

import asyncio
import base64
import contextlib
import copy
import logging
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException as HTTPClientError
from typing import Any
from urllib.request import Request as URLRequest
from urllib.request import urlopen

import torch
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response
from jinja2 import TemplateError
from PIL import Image
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.utils import GenerationState, _GenerationCancelled, set_torch_seed

from .images import decode_in_time
from .inference import check_length, longest_context
from .modeling_movekd import MoveKDForConditionalGeneration
from .prompts import prepare
from .serve_requests import ChatRequest, Message, TextPart, parse_request


logger = logging.getLogger(__name__)

STOPPING = "The server is stopping."
FAILED = "The server failed to answer; its log says why."
MAX_REQUEST_BYTES = 32 * 2**20
MAX_REQUESTS = 100  # at a time
BODY_SECONDS = 30  # for the client to send it
DOWNLOAD_SECONDS = 10
DECODING_SECONDS = 10  # for all images of a request


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


def read_image(url: str, limits: Limits, seconds: float = DECODING_SECONDS) -> Image.Image:
    """Decode the image of a data URL, or of an http(s) address if `limits.image_urls`, in so many seconds."""
    scheme = url[:8].partition(":")[0].lower()
    if scheme == "data":
        header, _, payload = url.partition(",")
        if not header.strip().lower().endswith(";base64"):
            raise ValueError("a data URL begins with data:image/png;base64, or another image type")
        if len(payload) * 3 // 4 > limits.image_bytes:
            raise ValueError(f"{len(payload) * 3 // 4} bytes; at most {limits.image_bytes} are read")
        try:
            # MIME encoders break lines.
            content = base64.b64decode(payload.encode().translate(None, b" \t\r\n"), validate=True)
        except ValueError as error:
            raise ValueError(f"not base64 ({error})") from error
    elif scheme in ("http", "https") and limits.image_urls:
        content = _download(url, limits.image_bytes)
    else:
        ways = "a data URL (data:image/png;base64,...)" + (" or an http(s) address" if limits.image_urls else "")
        raise ValueError(f"an image comes as {ways}; this server opens no other addresses and no files")
    return decode_in_time(content, seconds, limits.image_side)


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
            raise HTTPException(503, STOPPING)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class StopText:
    """Cuts a text, which comes in pieces, before the first of several strings."""

    def __init__(self, strings: Sequence[str]) -> None:
        self.strings, self.held, self.found = strings, "", False

    def add(self, piece: str) -> str:
        """Add a piece, and return the text that no string can begin in."""
        if self.found:
            return ""
        text = self.held + piece
        begins = [index for string in self.strings if (index := text.find(string)) >= 0]
        self.found = bool(begins)
        if self.found:
            end, self.held = min(begins), ""
        else:
            lengths = range(1, min(max(map(len, self.strings), default=0), len(text) + 1))
            held = [n for n in lengths if any(string.startswith(text[-n:]) for string in self.strings)]
            end = len(text) - max(held, default=0)
            self.held = text[end:]
        return text[:end]

    def rest(self) -> str:
        """Return the text that is held back, at the end of the answer."""
        rest, self.held = self.held, ""
        return rest


class AtStopText(StoppingCriteria):
    """Stops the generation when the answer has one of several strings."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: Sequence[str], prompt_tokens: int) -> None:
        self.tokenizer, self.strings, self.start = tokenizer, strings, prompt_tokens
        # A character takes up to four tokens.
        self.window = 4 * max(map(len, strings), default=0) + 8

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.start :][:, -self.window :], skip_special_tokens=True)
        found = [any(string in text for string in self.strings) for text in texts]
        return torch.tensor(found, device=input_ids.device)


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
        # Few requests may hold images at a time. Padding changes a tokenizer's state, so that one thread at a time may
        # prepare, with another tokenizer than the thread that decodes.
        self._holding_images, self._preparing = asyncio.Semaphore(2), asyncio.Lock()
        self._own_processor = copy.deepcopy(processor)
        self._stop = StopText(())

    async def read_request(self, connection: Request) -> ChatRequest:
        """Read and parse a request. Parsing runs in a thread, so that other clients get their answers meanwhile."""
        # A browser asks before it sends JSON to another site, but not before it sends plain text.
        if connection.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise HTTPException(400, "The body must be a valid dictionary in JSON, sent as application/json.")
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await connection.body()
        except TimeoutError:
            message = f"The request did not arrive within {BODY_SECONDS} seconds."
            raise HTTPException(408, message, {"Connection": "close"}) from None
        except ClientDisconnect:
            raise HTTPException(499, "The client left.") from None
        try:
            return await asyncio.to_thread(parse_request, body, self.limits.prompt_characters)
        except ValueError as error:
            raise HTTPException(400, str(error)) from error

    async def handle_request(self, request: ChatRequest, request_id: str, connection: Request) -> Response:
        """Return the answer or a stream of it. The generation stops when the client leaves."""
        if request.model != self.name:
            raise HTTPException(404, f"There is no model {request.model[:200]!r}; this server has {self.name!r}.")
        try:
            async with self._holding_images:
                messages = await asyncio.to_thread(self._messages, request.messages)
                async with self._preparing:
                    inputs, generation = await asyncio.to_thread(self._prepare, request, messages)
        except (ValueError, TemplateError) as error:
            raise HTTPException(400, str(error)) from error
        manager = self.generation_state.get_manager(self.name)
        if request.seed is not None:
            # Queued, so that no other request runs between the seed and its generation.
            manager.submit(set_torch_seed, request.seed)
        # The library passes the inputs to `generate`, so other arguments of `generate` travel with them.
        abandoned = Abandoned(self)
        inputs["stopping_criteria"] = StoppingCriteriaList([abandoned])
        answering = copy.copy(self)
        if request.stop:
            answering._stop = StopText(request.stop)
            prompt_tokens = inputs["input_ids"].shape[1]
            inputs["stopping_criteria"].append(AtStopText(self.processor.tokenizer, request.stop, prompt_tokens))
        model = Streamed(self.model) if request.stream else self.model
        arguments = (request_id, model, self.processor, self.name, inputs, generation)
        if request.stream:  # the library ends a stream when the client leaves
            return answering._streaming(*arguments, gen_manager=manager)
        watch = asyncio.create_task(_wait_until_left(connection, abandoned.left))
        try:
            return await answering._non_streaming(*arguments, gen_manager=manager)
        finally:
            watch.cancel()

    # The library builds answers by the next two methods, which cut them at the request's stop strings.

    def _build_completion(
        self, request_id: str, content: str, model_id: str, finish_reason: str, **rest: Any
    ) -> dict[str, Any]:
        content = self._stop.add(content) + self._stop.rest()
        finish_reason = "stop" if self._stop.found else finish_reason
        return super()._build_completion(request_id, content, model_id, finish_reason, **rest)

    def _build_chunk_sse(
        self, request_id: str = "", content: str | None = None, finish_reason: str | None = None, **rest: Any
    ) -> str:
        if content:
            content = self._stop.add(content)
            return super()._build_chunk_sse(request_id, content, **rest) if content else ""
        begin = ""
        if finish_reason is not None:
            if held := self._stop.rest():
                begin = super()._build_chunk_sse(request_id, held, model=rest.get("model"))
            finish_reason = "stop" if self._stop.found else finish_reason
        return begin + super()._build_chunk_sse(request_id, content, finish_reason=finish_reason, **rest)

    def _prepare(
        self, request: ChatRequest, messages: Sequence[dict[str, Any]]
    ) -> tuple[dict[str, Any], GenerationConfig]:
        inputs = prepare(self._own_processor, [messages], self.model.device)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        return inputs, self._generation(request, inputs)

    def _messages(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Convert messages to the form that chat templates take, and decode their images."""
        parts = [part for message in messages for part in message.content]
        texts = [part.text for part in parts if isinstance(part, TextPart)]
        text = "".join(texts)  # some templates join the parts of a message
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
        read, converted, end = 0, [], time.monotonic() + DECODING_SECONDS
        for message in messages:
            content: list[dict[str, Any]] = []
            for part in message.content:
                if isinstance(part, TextPart):
                    content.append({"type": "text", "text": part.text})
                    continue
                if message.role != "user":
                    raise ValueError(f"A message of the {message.role} has an image; only the user's may.")
                read, left = read + 1, end - time.monotonic()
                try:
                    content.append({"type": "image", "image": read_image(part.image_url.url, self.limits, left)})
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


def refusal(status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """Return an error in OpenAI's format."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    content = {"error": {"message": message, "type": kind, "param": None, "code": None}}
    return JSONResponse(content, status, headers)


class RequestLimit:
    """
    Middleware that refuses requests while `MAX_REQUESTS` others are open, and open ones when the server ends. Silent
    connections do not count.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app, self.open = app, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self.open >= MAX_REQUESTS:
            await refusal(503, "The server is busy. Try again later.")(scope, receive, send)
            return
        self.open += 1
        try:
            await self.app(scope, receive, send)
        except asyncio.CancelledError:
            with contextlib.suppress(RuntimeError):  # of an answer that has begun
                await refusal(503, STOPPING)(scope, receive, send)
        finally:
            self.open -= 1


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
    app.add_middleware(RequestLimit)

    @app.exception_handler(StarletteHTTPException)
    async def refuse(request: Request, error: StarletteHTTPException) -> JSONResponse:
        return refusal(error.status_code, str(error.detail), error.headers)

    @app.exception_handler(Exception)
    async def fail(request: Request, error: Exception) -> JSONResponse:
        return refusal(500, FAILED)

    @app.post("/v1/chat/completions")
    async def chat_completions(connection: Request) -> Response:
        request = await handler.read_request(connection)
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
