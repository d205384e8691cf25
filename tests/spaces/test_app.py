"""The Space as programs use it: started for real, far from the repository, and asked by the official clients."""

import asyncio
import base64
import json
import os
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, CLIPVisionModel

from modeling_movekd import MoveKDForConditionalGeneration


pytest.importorskip("gradio", reason="the Space needs gradio")
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError


ROOT = Path(__file__).resolve().parents[2]
SPACE = ROOT / "spaces"
FIRST, SECOND, THIRD = (SPACE / "examples" / f"scene_{number}.png" for number in (1, 2, 3))
COUNT, SHAPE = "How many objects are there?", "What shape is the cyan object?"


@pytest.fixture
def client(space) -> Client:
    return Client(space.url, verbose=False, httpx_kwargs={"timeout": 300})


@pytest.fixture(scope="module")
def student(checkpoint) -> tuple[MoveKDForConditionalGeneration, Any]:
    """Model and processor, loaded without the Space."""
    model = MoveKDForConditionalGeneration.from_pretrained(checkpoint)
    return model, AutoProcessor.from_pretrained(checkpoint, backend="pil", trust_remote_code=True)


def expected(student, turns: Sequence[tuple[Sequence[Path], str]], tokens: int) -> list[str]:
    """The greedy answers to a conversation's questions, each by one plain `generate` over all that was said."""
    model, processor = student
    messages: list[dict[str, Any]] = []
    answers = []
    for paths, text in turns:
        content = [{"type": "image", "image": Image.open(path).convert("RGB")} for path in paths]
        messages.append({"role": "user", "content": [*content, {"type": "text", "text": text}]})
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        answers.append(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answers[-1]}]})
    return answers


def message(text: str, *paths: Path) -> dict[str, Any]:
    return {"text": text, "files": [handle_file(path) for path in paths]}


def call(url: str, endpoint: str, data: Sequence[Any]) -> str:
    """What an endpoint says to a request without any client."""
    address, body = f"{url}/gradio_api/call/{endpoint}", json.dumps({"data": data}).encode()
    with urlopen(Request(address, body, {"Content-Type": "application/json"}), timeout=60) as response:
        event = json.load(response)["event_id"]
    with urlopen(f"{address}/{event}", timeout=60) as response:
        return response.read().decode()


# --- Answers -------------------------------------------------------------------------------------------------------


def test_an_answer_is_that_of_generate_and_grows_while_it_is_made(client, student):
    job = client.submit(handle_file(SECOND), COUNT, 0, 1, 24, api_name="/ask")
    answer = job.result(timeout=120)
    assert [answer] == expected(student, [([SECOND], COUNT)], 24) and len(answer.split()) > 5
    grown = job.outputs()
    assert len(grown) > 3 and grown[-1] == answer
    assert all(
        later.startswith(earlier) and later != earlier for earlier, later in zip(grown, grown[1:], strict=False)
    )


def test_conversations_of_two_clients_do_not_mix(space, student):
    """Several turns, with several images and with none; text alone is a conversation too."""
    clients = [Client(space.url, verbose=False, httpx_kwargs={"timeout": 300}) for _ in range(2)]
    turns: list[list[tuple[list[Path], str]]] = [
        [([FIRST, SECOND], COUNT), ([], SHAPE), ([THIRD], COUNT)],
        [([], "Is there a red circle?"), ([THIRD], SHAPE)],
    ]
    answers: list[list[str]] = [[], []]
    for round_ in range(3):
        for asker, said, heard in zip(clients, turns, answers, strict=True):
            if round_ < len(said):
                paths, text = said[round_]
                heard.append(asker.predict(message(text, *paths), 0, 1, 12, api_name="/chat"))
    assert answers == [expected(student, said, 12) for said in turns]
    assert answers[0][1] != expected(student, [([], SHAPE)], 12)[0], "the answer depends on what was said before"


def test_a_temperature_draws(client):
    drawn = {client.predict(handle_file(FIRST), COUNT, 2, 1, 24, api_name="/ask") for _ in range(3)}
    assert len(drawn) > 1


# --- Refusals ------------------------------------------------------------------------------------------------------


def bomb(path: Path, width: int, height: int) -> Path:
    """A PNG of a few bytes that says it has so many pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    (folder / "text.png").write_text("no picture")
    (folder / "half.png").write_bytes(FIRST.read_bytes()[:4000])
    (folder / "page.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    (folder / "program.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n")
    return {
        "no picture": folder / "text.png",
        "half of one": folder / "half.png",
        "a drawing": folder / "page.svg",
        "a program": folder / "program.eps",
        "a bomb": bomb(folder / "bomb.png", 60_000, 60_000),
        "a smaller bomb": bomb(folder / "small.png", 9_000, 9_000),
        "a strip": bomb(folder / "strip.png", 20_000, 1),
    }


REFUSED_FILES = {
    "no picture": "cannot be used: not an image of a known format",
    "half of one": "cannot be decoded",
    "a drawing": "not an image of a known format",
    "a program": "not an image of a known format",
    "a bomb": "DecompressionBombError|60000 x 60000",
    "a smaller bomb": "9000 x 9000 pixels; its sides may have 1 to 8000",
    "a strip": "20000 x 1 pixels; its sides may have 1 to 8000",
}


@pytest.mark.parametrize("name", REFUSED_FILES)
def test_files_that_are_no_usable_image(client, files, name):
    for arguments, endpoint in (((COUNT, 0, 1, 4), "/ask"), ((1,), "/pictures")):
        with pytest.raises(AppError, match=REFUSED_FILES[name]) as refused:
            client.predict(handle_file(files[name]), *arguments, api_name=endpoint)
        assert "/" not in str(refused.value) and "Traceback" not in str(refused.value)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ((None, " ", 0, 1, 4), "Write a question"),
        ((None, "number " * 600, 0, 1, 4), "4199 characters; at most 4000"),
        ((None, "number " * 550, 0, 1, 40), r"has \d{3} tokens and the answer may have 40, but the model takes 512"),
        ((None, COUNT, 3, 1, 4), r"Temperature is 3 \(0 to 2\)"),
        ((None, COUNT, 0, 0, 4), "top-p 0"),
        ((None, COUNT, 0, 1, 0), "longest answer 0 tokens"),
        ((None, COUNT, 0, 1, 100_000), "longest answer 100000 tokens"),
    ],
)
def test_requests_beyond_the_bounds(client, arguments, sentence):
    with pytest.raises(AppError, match=sentence):
        client.predict(*arguments, api_name="/ask")


def test_a_refused_turn_leaves_the_conversation_as_it_was(client, student, files):
    assert [client.predict(message(COUNT, FIRST), 0, 1, 6, api_name="/chat")]
    with pytest.raises(AppError, match="Image 2 of the conversation cannot be used: not an image"):
        client.predict(message(SHAPE, files["no picture"]), 0, 1, 6, api_name="/chat")
    with pytest.raises(AppError, match="The conversation has 9 images; at most 8"):
        client.predict(message(SHAPE, *[SECOND] * 8), 0, 1, 6, api_name="/chat")
    answer = client.predict(message(SHAPE), 0, 1, 6, api_name="/chat")
    assert answer == expected(student, [([FIRST], COUNT), ([], SHAPE)], 6)[1]


ADDRESS = {"path": "https://example.org/picture.png", "meta": {"_type": "gradio.FileData"}}


@pytest.mark.parametrize(
    ("endpoint", "data"),
    [
        ("ask", [ADDRESS, COUNT, 0, 1, 4]),
        ("ask", [None, COUNT, ADDRESS, 1, 4]),  # Gradio looks for files in whatever is sent
        ("chat", [{"text": COUNT, "files": [ADDRESS]}, 0, 1, 4]),
        ("pictures", [ADDRESS, 1]),
        ("experts", [ADDRESS, 1]),
    ],
)
def test_addresses_are_not_opened(space, endpoint, data):
    """Gradio would download them, whatever their size."""
    assert "Send the image as a file: addresses are not opened here." in call(space.url, endpoint, data)


@pytest.mark.parametrize("layer", [0, 4, 1.5])
def test_layers_that_the_encoder_has_not(client, layer):
    with pytest.raises(AppError, match=f"Layer {layer} is none of this encoder's: 1 to 3"):
        client.predict(handle_file(FIRST), layer, api_name="/experts")


def test_files_of_the_server_stay_there(space, checkpoint):
    """A path that was not uploaded is neither opened nor given out, though there is a file."""
    api = f"{space.url}/gradio_api"
    assert FIRST.is_file() and (checkpoint / "config.json").is_file()
    said = call(space.url, "ask", [{"path": str(FIRST), "meta": {"_type": "gradio.FileData"}}, COUNT, 0, 1, 4])
    assert "event: error" in said and "event: complete" not in said
    for path in (checkpoint / "config.json", space.log.parent / "space" / "app.py", FIRST):
        with pytest.raises(HTTPError, match="403"):
            urlopen(f"{api}/file={path}", timeout=60)


SHAPES = [
    ["purple"],
    {"purple": 1},
    [{"path": "purple"}, "purple", "purple", 1, 4],
    [None, ["purple"], 0, 1, 4],
    [None, {"text": "purple"}, 0, 1, 4],
    [None, "Which?", "purple", 1, 4],
    [[["purple"]], "Which?", 0, 1, 4],
    [{"purple": {}}, 1],
    [{"text": ["purple"], "files": "purple"}, 0, 1, 4],
    "purple",
]


@pytest.mark.parametrize("endpoint", ["ask", "chat", "pictures", "experts", "page", "purple"])
def test_calls_of_a_wrong_shape_leave_no_text_in_the_log(space, endpoint):
    """They get an error and no more than their place is logged. Large ones are not read at all."""
    for data in SHAPES:
        try:
            said = call(space.url, endpoint, data)
            assert "event: error" in said or "event: complete" in said
        except HTTPError as error:
            assert error.code in (422, 500)
    assert "purple" not in space.log.read_text(errors="replace")
    for data in (["purple"] * 200_000, [[] for _ in range(30_000)]):
        with pytest.raises(HTTPError, match="413"):
            call(space.url, endpoint, data)


# --- Pictures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [1, 3])
def test_pictures_are_the_models_own(client, student, encoders, layer):
    """Each equals what the model draws, every pixel of it a square of 7 x 7; plain CLIP is that of the same layer."""
    model, processor = student
    pixels = processor.image_processor(Image.open(SECOND).convert("RGB"), return_tensors="pt")["pixel_values"]
    clip = CLIPVisionModel.from_pretrained(encoders["CLIP_ID"])
    tokens = clip(pixels, output_hidden_states=True).hidden_states[layer][:, 1:]
    drawn = model.visualize(pixels, layer - 1, other_tokens={"clip": tokens})
    gallery, shares = client.predict(handle_file(SECOND), layer, api_name="/pictures")
    pictures = {entry["caption"]: Image.open(entry["image"]).convert("RGB") for entry in gallery}
    wanted = {
        "What the encoder sees": drawn.image,
        "Experts": drawn.experts,
        "[CLS] attention": drawn.cls_attention,
        f"Student, layer {layer}": drawn.components,
        f"Plain CLIP, layer {layer}": drawn.others["clip"].components,
        f"Distance to plain CLIP, layer {layer}": drawn.others["clip"].distance,
    }
    assert set(pictures) == {*wanted, "Reader, last layer", "Distance to reader, last layer"}
    for title, tensor in wanted.items():
        shown = torch.frombuffer(bytearray(pictures[title].tobytes()), dtype=torch.uint8).view(448, 448, 3)
        # Experts are folded there and not here, which rounds
        assert (shown.float() - tensor[0].repeat_interleave(7, 0).repeat_interleave(7, 1).float()).abs().max() <= 2
    for title in ("Reader, last layer", "Distance to reader, last layer"):
        assert pictures[title].size == (448, 448) and len(pictures[title].getcolors(10**6)) > 8
    assert [row["expert"] for row in shares] == [1, 2, 3] and len({row["color"] for row in shares}) == 3
    assert all(row["colour"] == row["color"] for row in shares), "the former name"
    assert [row["share"] for row in shares] == pytest.approx(drawn.expert_shares[0].tolist(), abs=1e-4)
    assert client.predict(handle_file(SECOND), layer, api_name="/experts") == shares


# --- The machine, other clients, and what stays ----------------------------------------------------------------------


def test_speed_is_measured(client):
    sentence = client.predict(api_name="/speed")
    first, rate, tokens = re.search(
        r"([\d.]+) s to the first token .* ([\d.]+) tokens per second over (\d+) tokens", sentence
    ).groups()
    assert 0 < float(first) and 0 < float(rate) and tokens == "32" and "CPU with 1 thread(s), float32" in sentence
    assert client.predict(api_name="/speed") != sentence, "each is a measurement of its own"


def test_tools_of_the_mcp_server(space, student):
    """By the official client: what an assistant sees, one answer about an image and one refusal."""
    mcp = pytest.importorskip("mcp")
    from mcp.client.streamable_http import streamablehttp_client

    async def visit() -> tuple[set[str], Any, Any, Any]:
        async with streamablehttp_client(f"{space.url}/gradio_api/mcp/") as (read, write, _):
            async with mcp.ClientSession(read, write) as session:
                await session.initialize()
                names = {tool.name for tool in (await session.list_tools()).tools}
                image = f"data:image/png;base64,{base64.b64encode(SECOND.read_bytes()).decode()}"
                asked = {"image": image, "question": COUNT, "max_new_tokens": 8}
                questions = (asked, {"question": ""}, {"image": ADDRESS["path"], "question": COUNT})
                return names, *[await session.call_tool("ask", question) for question in questions]

    names, answer, refusal, unopened = asyncio.run(visit())
    assert names >= {"ask", "pictures", "experts"}
    assert not answer.isError and [answer.content[0].text] == expected(student, [([SECOND], COUNT)], 8)
    assert refusal.isError and "Write a question" in refusal.content[0].text
    assert unopened.isError and "addresses are not opened here" in unopened.content[0].text


def test_no_other_port_than_the_one_given(checkpoint, space, tmp_path):
    port = str(urlsplit(space.url).port)
    own = {"MODEL_ID": str(checkpoint), "CLIP_ID": "none", "HF_HUB_OFFLINE": "1", "TMPDIR": str(tmp_path)}
    command = [sys.executable, SPACE / "app.py", "--host", "127.0.0.1", "--port", port]
    ended = subprocess.run(command, env=os.environ | own, capture_output=True, text=True, timeout=180, check=False)
    assert ended.returncode != 0 and f"Cannot find empty port in range: {port}-{port}" in ended.stderr, ended.stderr


def test_nothing_is_kept(checkpoint, space, files):
    """Last, as it ends the Space: an upload lies in a folder for its user alone, no word of it in the log."""
    client = Client(space.url, verbose=False, httpx_kwargs={"timeout": 300})
    client.predict(message("Is there a purple triangle?", THIRD), 0, 1, 4, api_name="/chat")
    with pytest.raises(AppError):
        client.predict(message("Is there a purple cross?", files["no picture"]), 0, 1, 4, api_name="/chat")
    (folder,) = space.temporary.glob("movekd-*")
    assert folder.stat().st_mode & 0o077 == 0 and list(folder.rglob("scene_3.png"))
    assert space.end() == 0
    assert not [path for path in space.temporary.rglob("*") if path.is_file()]
    log = space.log.read_text(errors="replace")
    assert "purple" not in log and "scene_3" not in log, log
