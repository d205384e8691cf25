"""The parts of the server that take no process of their own: addresses of images, clients that leave, failures."""

import asyncio
import base64
import contextlib
import http.server
import io
import json
import threading
import time
from dataclasses import replace

import pytest
import torch
from PIL import Image


pytest.importorskip("openai", reason="serving needs openai")
pytest.importorskip("fastapi", reason="serving needs fastapi")

from modeling_movekd import serve_openai
from modeling_movekd.serve_openai import MAX_REQUEST_BYTES, ChatHandler, Limits, StopText, build_app, read_image


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    return buffer.getvalue()


PICTURE = picture()
URL = "data:image/png;base64," + base64.b64encode(PICTURE).decode()


class Site(http.server.BaseHTTPRequestHandler):
    """`/to?ADDRESS` leads elsewhere, `/slow` comes a byte at a time, everything else is a picture."""

    def do_GET(self) -> None:
        page, _, address = self.path.partition("?")
        self.send_response(302 if page == "/to" else 200)
        if page == "/to":
            self.send_header("Location", address)
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # of a client that has had enough
            if page == "/slow":
                for index in range(len(PICTURE)):
                    self.wfile.write(PICTURE[index : index + 1])
                    time.sleep(0.05)
            elif page != "/to":
                self.wfile.write(PICTURE)

    def log_message(self, *arguments: object) -> None:
        pass


def test_image_urls_by_flag(tmp_path, monkeypatch):
    (tmp_path / "secret.png").write_bytes(PICTURE)
    file = (tmp_path / "secret.png").as_uri()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site) as site:
        thread = threading.Thread(target=site.serve_forever)
        thread.start()
        try:
            address = f"http://127.0.0.1:{site.server_port}"
            limits = Limits(image_urls=True)
            assert read_image(f"{address}/a.png", limits).getpixel((0, 0)) == (255, 0, 0)
            refused = [(file, "or an http"), (f"{address}/to?{file}", "cannot be read"), (f"{address}/a b", "cannot")]
            for url, reason in refused:
                with pytest.raises(ValueError, match=reason):
                    read_image(url, limits)
            with pytest.raises(ValueError, match=f"more than {len(PICTURE) - 1} bytes"):
                read_image(f"{address}/a.png", replace(limits, image_bytes=len(PICTURE) - 1))
            monkeypatch.setattr(serve_openai, "DOWNLOAD_SECONDS", 0.3)
            with pytest.raises(ValueError, match="took more than 0.3 seconds"):
                read_image(f"{address}/slow", limits)
        finally:
            site.shutdown()
            thread.join()
    with pytest.raises(ValueError, match="bytes; at most 20"):
        read_image(URL, Limits(image_bytes=20))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("stop", [["\n\nUser:"], ["zzz", "\n\nUser:"], ["\n\nUser: in full", "\n\nUser:"]])
def test_a_stop_string_is_found_over_several_pieces(size: int, stop: list[str]) -> None:
    said, text = "A\n\nUs.\n\nUser: b", StopText(stop)
    pieces = [said[start : start + size] for start in range(0, len(said), size)]
    assert "".join(map(text.add, pieces)) + text.rest() == "A\n\nUs." and text.found


class Call:
    """One chat request to an app in this process, after which the client may leave at once."""

    def __init__(self, app, leaves: bool = False, **fields: object) -> None:
        fields = {"model": "tiny", "messages": [{"role": "user", "content": "?"}]} | fields
        self.messages = [{"type": "http.request", "body": json.dumps(fields).encode(), "more_body": False}]
        self.messages += [{"type": "http.disconnect"}] * leaves
        self.sent: list[dict] = []
        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": headers}
        self.run = app(scope | {"query_string": b"", "http_version": "1.1"}, self.receive, self.send)

    async def receive(self) -> dict:
        if not self.messages:
            await asyncio.Event().wait()
        return self.messages.pop(0)

    async def send(self, message: dict) -> None:
        self.sent.append(message)

    def answer(self) -> tuple[int, dict]:
        return self.sent[0]["status"], json.loads(self.sent[1]["body"])


def failure(message: str) -> dict:
    return {"message": message, "type": "server_error", "param": None, "code": None}


@pytest.fixture
def endless(make_model, make_processor) -> ChatHandler:
    """A model whose answer takes a million tokens."""
    model = make_model(image_token_id=None)
    model.config.text_config.max_position_embeddings = 2_000_000
    model.generation_config.eos_token_id = None
    return ChatHandler("tiny", model, make_processor(model), Limits(new_tokens=1_000_000))


def test_answers_that_nobody_waits_for_are_given_up(endless):
    call = Call(build_app(endless), leaves=True)
    asyncio.run(call.run)
    assert call.answer()[0] == 499
    endless.stopping = lambda: True
    call = Call(build_app(endless))
    asyncio.run(call.run)
    assert call.answer() == (503, {"error": failure("The server is stopping.")})


def test_a_failure_is_told_without_its_details(endless):
    torch.nn.init.constant_(endless.model.lm_head.weight, float("nan"))
    call = Call(build_app(endless), temperature=1)
    with pytest.raises(RuntimeError, match="nan"):
        asyncio.run(call.run)
    assert call.answer() == (500, {"error": failure("The server failed to answer; its log says why.")})


def test_a_failure_of_a_stream_is_logged_and_told_without_its_details(endless, caplog):
    torch.nn.init.constant_(endless.model.lm_head.weight, float("nan"))
    call = Call(build_app(endless), temperature=1, stream=True)
    asyncio.run(call.run)
    first, last, rest = b"".join(message.get("body", b"") for message in call.sent).decode().split("\n\n")
    assert "assistant" in first and rest == ""
    assert json.loads(last.removeprefix("data: ")) == {"error": "The server failed to answer; its log says why."}
    assert "probability tensor contains either" in caplog.text and "nan" in caplog.text
    endless.stopping = lambda: True
    call = Call(build_app(endless), stream=True)
    asyncio.run(call.run)
    assert b"The server is stopping." in call.sent[-2]["body"] and len(caplog.records) == 1


def test_a_request_too_large_is_not_read(endless):
    call = Call(build_app(endless), messages="x" * MAX_REQUEST_BYTES)
    asyncio.run(call.run)
    assert call.sent[0]["status"] == 413
