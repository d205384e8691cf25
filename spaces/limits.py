"""Middleware that bounds what visitors send, before Gradio reads it."""

import sys
import time
import traceback
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse
from uploads import KEPT_SECONDS, MAX_FILE_MB, MAX_IMAGES


MAX_BODY = 2**20
# Images come as uploads, or inside the bodies of MCP tools as base64.
MAX_UPLOAD = MAX_IMAGES * MAX_FILE_MB * 2**20 + MAX_BODY
MAX_TOOL_BODY = MAX_FILE_MB * 2**20 * 4 // 3 + MAX_BODY
MAX_BRACKETS = 20_000  # of a body, where each list and object takes memory and time
# What one visitor, and all of them, may have sent in the time that it is kept
MAX_VISITOR = 2 * MAX_UPLOAD
MAX_TOGETHER = 20 * MAX_UPLOAD


class _Refused(Exception):
    """A request is refused. The message is for the visitor."""


@dataclass
class _Sent:
    """What a visitor sent with one request."""

    visitor: str
    time: float
    size: int = 0


class BodyLimits:
    """
    ASGI middleware that refuses large requests, and requests of visitors who have sent much. It logs only the place of
    an unexpected error, since the text may contain what a visitor wrote.
    """

    def __init__(self, app: Any) -> None:
        self.app = app
        self.sent: list[_Sent] = []

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        has_begun, has_more = False, True

        async def noted(message: dict[str, Any]) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        async def tracked() -> dict[str, Any]:
            nonlocal has_more
            message: dict[str, Any] = await receive()
            has_more = message.get("more_body", False)
            return message

        try:
            reading = tracked
            if scope["path"].rstrip("/").endswith("/upload"):
                reading = self._counted(scope, tracked, MAX_UPLOAD)
            elif "/mcp" in scope["path"]:
                reading = await self._read(self._counted(scope, tracked, MAX_TOOL_BODY))
            elif scope["method"] not in ("GET", "HEAD", "OPTIONS"):
                reading = await self._read(self._counted(scope, tracked, MAX_BODY))
            await self.app(scope, reading, noted)
        except _Refused as error:
            skipped = 0
            while has_more and skipped < MAX_UPLOAD:  # A client reads no answer while it sends.
                skipped += len((await tracked()).get("body", b""))
            if not has_begun:
                answer = JSONResponse({"detail": str(error)}, 413, {"Connection": "close"})
                await answer(scope, receive, send)
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            print(f"{type(error).__name__} at {frame.filename}:{frame.lineno}", file=sys.stderr, flush=True)
            if not has_begun:
                await JSONResponse({"detail": "Something failed here."}, 500)(scope, receive, send)

    def _counted(self, scope: dict[str, Any], receive: Any, most: int) -> Any:
        """Return a `receive` that refuses bodies above `most` bytes and counts them for the visitor."""
        sent = _Sent((scope.get("client") or ("",))[0], time.monotonic())
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > most:
            raise _Refused(f"The request has {int(declared):,} bytes; at most {most:,} are taken.")
        if holds_images := most > MAX_BODY:
            self.sent.append(sent)

        async def counted() -> dict[str, Any]:
            message: dict[str, Any] = await receive()
            sent.size += len(message.get("body", b""))
            if sent.size > most:
                raise _Refused(f"The request has more than {most:,} bytes, which are the most that are taken.")
            if holds_images:
                self._check(sent.visitor)
            return message

        return counted

    def _check(self, visitor: str) -> None:
        oldest = time.monotonic() - KEPT_SECONDS
        self.sent = [sent for sent in self.sent if sent.time > oldest]
        if sum(sent.size for sent in self.sent if sent.visitor == visitor) > MAX_VISITOR:
            raise _Refused(f"You have sent {MAX_VISITOR >> 20} MB within an hour, the limit. Try again later.")
        if sum(sent.size for sent in self.sent) > MAX_TOGETHER:
            raise _Refused("Visitors have sent more images than this server keeps. Try again later.")

    async def _read(self, receive: Any) -> Any:
        """Read a body whole and return a `receive` that gives it."""
        body, has_more = bytearray(), True
        while has_more:
            message = await receive()
            if message["type"] != "http.request":
                return _replayed(message, receive)
            body += message.get("body", b"")
            has_more = message.get("more_body", False)
        if body.count(b"[") + body.count(b"{") > MAX_BRACKETS:
            raise _Refused(f"The request has more than {MAX_BRACKETS:,} lists and objects.")
        return _replayed({"type": "http.request", "body": bytes(body), "more_body": False}, receive)


def _replayed(first: dict[str, Any], receive: Any) -> Any:
    messages = [first]

    async def replayed() -> dict[str, Any]:
        return messages.pop() if messages else await receive()

    return replayed
