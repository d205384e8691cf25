"""The server in a process of its own, asked by OpenAI's client; every answer is held against plain `generate`."""

import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from modeling_movekd import serve
from modeling_movekd.inference import load_checkpoint, user_message
from modeling_movekd.prompts import prepare


openai = pytest.importorskip("openai", reason="needs OpenAI's client (openai)")
pytest.importorskip("fastapi", reason="serving needs fastapi")
pytest.importorskip("uvicorn", reason="serving needs uvicorn")


NEW_TOKENS = 12
MODULE = [sys.executable, "-m", "modeling_movekd.serve"]
PRINTABLE = [chr(code) for code in range(ord("!"), ord("~") + 1)]


@pytest.fixture(scope="module")
def checkpoint(make_model, make_processor, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    model = make_model(image_token_id=None)
    model.config.text_config.max_position_embeddings = 1200
    processor = make_processor(model)
    vocabulary = processor.tokenizer.get_vocab()
    # A token is a byte here: only ASCII, or else a stream would end inside a character
    model.generation_config.suppress_tokens = [i for token, i in vocabulary.items() if token not in PRINTABLE]
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory) -> Iterator[SimpleNamespace]:
    """Its address, and the file of what it says."""
    log = tmp_path_factory.mktemp("log") / "stderr"
    bounds = ["--max-images", "3", "--max-image-side", "64"]
    bounds += ["--max-new-tokens", "16", "--max-prompt-characters", "5000"]
    with log.open("w") as errors:
        process = subprocess.Popen(
            [*MODULE, str(checkpoint), "--name", "tiny", "--port", "0", *bounds],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    try:
        line = process.stdout.readline()
        match = re.search(r"http://127\.0\.0\.1:\d+/v1", line)
        assert match, line + log.read_text()
        yield SimpleNamespace(url=match[0], log=log, process=process)
        process.send_signal(signal.SIGINT)
        assert process.wait() in (0, -signal.SIGINT)
        assert log.read_text() == "" and process.stdout.read() == ""
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def client(server) -> "Iterator[openai.OpenAI]":
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def plain(checkpoint):
    """Greedy answer of `generate` to a conversation in the form chat templates take, experts not folded."""
    model, processor = load_checkpoint(checkpoint, fold=False)

    def answer(conversation: list, new_tokens: int = NEW_TOKENS) -> str:
        inputs = prepare(processor, [conversation], model.device)
        output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
        return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return answer


def data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def asked(text: str, urls: list[str] = ()) -> dict:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def ask(client, *messages: dict, **kwargs):
    settings = {"model": "tiny", "temperature": 0, "max_tokens": NEW_TOKENS} | kwargs
    return client.chat.completions.create(messages=list(messages), **settings)


def text_of(completion) -> str:
    return completion.choices[0].message.content


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_text_alone(client, plain):
    completion = ask(client, {"role": "user", "content": "What is it?"})
    expected = plain([user_message("What is it?")])
    assert text_of(completion) == expected and len(expected) == NEW_TOKENS
    assert completion.model == "tiny" and completion.choices[0].finish_reason == "length"
    assert completion.usage.completion_tokens == NEW_TOKENS
    system = {"role": "system", "content": "Be brief."}
    assert text_of(ask(client, system, asked("What?"))) == plain([system, user_message("What?")])
    # The longest answer of the server, for want of another
    assert text_of(ask(client, asked("What is it?"), max_tokens=None)) == plain([user_message("What is it?")], 16)


def test_images_and_turns(client, plain, make_image):
    images = [make_image(20 + 9 * seed, 16, seed) for seed in range(3)]
    urls = [data_url(image) for image in images]
    answers = [text_of(ask(client, asked("What?", [url]))) for url in urls]
    assert answers == [plain([user_message("What?", [image])]) for image in images]
    assert len(set(answers)) == 3, "the image decides"
    several = text_of(ask(client, asked("Compare.", urls)))
    assert several == plain([user_message("Compare.", images)])
    assert several != text_of(ask(client, asked("Compare.", urls[::-1])))
    # Turn by turn, the client's own message sent back
    completion = ask(client, asked("What?", urls[:1]))
    turns = [asked("What?", urls[:1]), completion.choices[0].message, asked("And these?", urls[1:])]
    said = {"role": "assistant", "content": [{"type": "text", "text": answers[0]}]}
    conversation = [user_message("What?", images[:1]), said, user_message("And these?", images[1:])]
    assert text_of(ask(client, *turns)) == plain(conversation)


def streamed(client, *messages: dict, **kwargs) -> str:
    with ask(client, *messages, stream=True, **kwargs) as stream:
        chunks = list(stream)
    assert sum(bool(chunk.choices[0].delta.content) for chunk in chunks) == NEW_TOKENS, "token by token"
    assert chunks[-1].choices[0].finish_reason == "length" and chunks[-1].usage.completion_tokens == NEW_TOKENS
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def test_streaming(client, plain, make_image):
    image = make_image(30, 20, 5)
    assert streamed(client, asked("What?", [data_url(image)])) == plain([user_message("What?", [image])])
    with ask(client, asked("Left early."), stream=True) as stream:
        next(iter(stream))
    assert text_of(ask(client, asked("Next."))) == plain([user_message("Next.")])


def test_clients_at_once_get_their_own_answers(server, plain, make_image):
    images = [make_image(24, 16, seed) for seed in range(4)]
    start, answers = threading.Barrier(4), {}

    def converse(index: int) -> None:
        with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as own:
            message = asked(f"Question {index}", [data_url(images[index])])
            start.wait()
            answers[index] = [streamed(own, message) if index % 2 else text_of(ask(own, message)) for _ in range(3)]

    threads = [threading.Thread(target=converse, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = [plain([user_message(f"Question {index}", [image])]) for index, image in enumerate(images)]
    assert len(set(expected)) == 4
    assert answers == {index: [answer] * 3 for index, answer in enumerate(expected)}


def test_a_temperature_samples_and_a_seed_repeats(client, plain):
    greedy = plain([user_message("What is it?")])
    first, again, other = (
        text_of(ask(client, asked("What is it?"), temperature=1.5, seed=seed)) for seed in (1, 1, 2)
    )
    assert first == again and len({first, other, greedy}) == 3
    assert text_of(ask(client, asked("What is it?"), temperature=0, top_p=0.9)) == greedy


def test_fields_that_clients_send_by_themselves(client, plain, make_image):
    """Values that ask for nothing are accepted; base64 comes in lines, and in capitals."""
    image = make_image(20, 16, 1)
    header, payload = data_url(image).split(",")
    lines = "\n".join(payload[start : start + 76] for start in range(0, len(payload), 76))
    url = f"{header.replace('base64', 'BASE64')},{lines}\r\n"
    said = {"role": "assistant", "content": "Yes.", "tool_calls": [], "refusal": None}
    neutral = {"stop": [], "response_format": {"type": "text"}, "tools": [], "tool_choice": "none", "store": False}
    neutral |= {"functions": [], "function_call": "none", "modalities": ["text"], "metadata": {}}
    neutral |= {"n": 1, "logprobs": False, "logit_bias": {}, "parallel_tool_calls": True, "frequency_penalty": 0}
    neutral |= {"top_logprobs": 0, "presence_penalty": 0, "reasoning_effort": "none", "verbosity": "medium"}
    neutral |= {"safety_identifier": "x", "prompt_cache_key": "x"}
    neutral["extra_body"] = {"repetition_penalty": 1.0, "min_p": 0, "top_k": -1}
    for stream in (False, True):
        turns = [asked("Well?") | {"name": "Ann"}, said, asked("What?", [url])]
        answer = streamed(client, *turns, **neutral) if stream else text_of(ask(client, *turns, **neutral))
        told = {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]}
        assert answer == plain([user_message("Well?"), told, user_message("What?", [image])])


def test_stop_ends_the_answer_before_it(client, plain):
    answer = plain([user_message("What is it?")])
    for stop in (answer[4:7], [answer[7], answer[4:7], "never"], answer[4:6]):
        end = min(answer.find(string) for string in ([stop] if isinstance(stop, str) else stop) if string in answer)
        completion = ask(client, asked("What is it?"), stop=stop)
        assert text_of(completion) == answer[:end] and completion.choices[0].finish_reason == "stop"
        assert completion.usage.completion_tokens < NEW_TOKENS
        with ask(client, asked("What is it?"), stop=stop, stream=True) as stream:
            chunks = list(stream)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer[:end]
        assert chunks[-1].choices[0].finish_reason == "stop"
    # A string that only begins at the end of the answer is no stop
    assert streamed_text(client, stop=answer[-2:] + "\0") == answer
    completion = ask(client, asked("What is it?"), stop=answer[-2:] + "\0")
    assert text_of(completion) == answer and completion.choices[0].finish_reason == "length"


def streamed_text(client, **settings) -> str:
    with ask(client, asked("What is it?"), stream=True, **settings) as stream:
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream)


GOOD = data_url(Image.new("RGB", (8, 8), "red"))
BASE64 = "data:image/png;base64,"
PART = {"type": "text"}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}
REFUSED = {
    "no image": ([asked("?", [BASE64 + base64.b64encode(b"no image").decode()])], {}, "Image 1 .*not an image"),
    "cut short": ([asked("?", [GOOD, GOOD[:-40]])], {}, "Image 2 .*(decoded|base64)"),
    "not base64": ([asked("?", [BASE64 + "%%%"])], {}, "not base64"),
    "plain data": ([asked("?", ["data:text/plain,hello"])], {}, "a data URL begins with"),
    "too large": (
        [asked("?", [data_url(Image.new("RGB", (65, 2)))])],
        {},
        "65 x 2 pixels.* 1 to 64",
    ),
    "too many": ([asked("?", [GOOD] * 2), asked("?", [GOOD] * 2)], {}, "4 images; at most 3"),
    "assistant's": ([{**asked("?", [GOOD]), "role": "assistant"}], {}, "message of the assistant has an image"),
    "placeholder": ([asked("<image>\nWhat?")], {}, "contains <image>"),
    "in two": ([{"role": "user", "content": [PART | {"text": t} for t in ("<ima", "ge>")]}], {}, "contains <image>"),
    "long": ([asked("x" * 1300)], {}, "language model takes 1200"),
    "no room": ([asked("x" * 1100)], {"max_tokens": 16}, "language model takes 1200"),
    "longer": ([asked("x" * 5001)], {}, "5001 characters; at most 5000"),
    "long answer": ([asked("?")], {"max_tokens": 17}, "at most 16"),
    "role": ([{"role": "tool", "content": "?", "tool_call_id": "1"}], {}, "messages.0"),
    "system last": ([asked("?"), {"role": "system", "content": "?"}], {}, "Unknown role system"),
    "no messages": ([], {}, "messages: List should have at least 1 item"),
    "part": ([{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}], {}, "messages.0.content.0"),
    "reasoning": ([asked("?")], {"reasoning_effort": "low"}, "reasoning_effort: Input should be 'none'"),
    "two answers": ([asked("?")], {"n": 2}, "n: Input should be 1"),
    "log probabilities": ([asked("?")], {"logprobs": True}, "logprobs: Input should be False"),
    "more of them": ([asked("?")], {"top_logprobs": 2}, "top_logprobs: Input should be 0"),
    "an audio": ([asked("?")], {"modalities": ["audio"]}, "modalities.0: Input should be 'text'"),
    "a penalty": ([asked("?")], {"presence_penalty": 0.5}, "presence_penalty: Input should be less than"),
    "unserved": ([asked("?")], {"web_search_options": {}}, "web_search_options: not a field that is served"),
    "tools": ([asked("?")], {"tools": [TOOL]}, "tools: List should have at most 0 items"),
    "a forced tool": ([asked("?")], {"tool_choice": "required"}, "tool_choice: Input should be 'none' or 'auto'"),
    "a form": ([asked("?")], {"response_format": {"type": "json_object"}}, "response_format.type: Input should be"),
    "stored": ([asked("?")], {"store": True}, "store: Input should be False"),
    "empty stop": ([asked("?")], {"stop": ""}, "stop.0: String should have at least 1 character"),
    "temperature": ([asked("?")], {"temperature": 3}, "temperature: Input should be less than or equal to 2"),
    "more fields": ([asked("?")], {"extra_body": {"generation_config": "{}"}}, "generation_config: not a field"),
    "templates": ([asked("?")], {"extra_body": {"chat_template_kwargs": {}}}, "chat_template_kwargs: not a field"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_say_why(case, client):
    messages, settings, reason = REFUSED[case]
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as refused:
            ask(client, *messages, stream=stream, **settings)
        assert refused.value.type == "invalid_request_error"
        assert re.search(reason, refused.value.body["message"]), refused.value.body
        assert len(refused.value.body["message"]) < 500 and "Traceback" not in str(refused.value.body)


def test_bodies_that_no_client_sends(server):
    fields = '{"model": "tiny", "messages": [{"role": "user", "content": "CONTENT"}], "temperature": 1}'
    bodies = {
        "{": "JSON decode error",
        "[]": "valid dictionary",
        "[" * 100_000: "parsing the body",
        fields.replace(": 1}", ": NaN}"): "temperature",
        fields.replace("CONTENT", r"\ud800"): "not valid Unicode",
        fields.replace("model", r"\ud800"): "unicode string",
        fields.replace("temperature", "t" * 10_000): "ttt: not a field",
        fields.replace('"CONTENT"', "[" + ", ".join(['{"type": "text", "text": ""}'] * 1001) + "]"): "at most 1000",
    }
    part = '{"type": "text", "text": ""}'
    message = f'{{"role": "user", "content": [{", ".join([part] * 900)}]}}'
    keys = ", ".join(f'"k{index}": 1' for index in range(2000))
    bodies |= {
        f"{{{', '.join(f'{index}: 1' for index in range(10**6))}}}".replace(" ", ""): "more than 20000 fields",
        f'{{"model": "tiny", "messages": [{", ".join([message] * 900)}]}}': "more than 20000 fields",
        f'{{"model": "tiny", "messages": [{", ".join([f"{{{keys}}}"] * 1000)}]}}': "more than 20000 fields",
        f'{{"model": "tiny", {keys}}}': "not a field that is served here",
        fields.replace("1}", '{"a": ' * 20 + "1" + "}" * 21): "nested deeper than 10",
        fields.replace("1}", "9" * 5000 + "}"): "JSON decode error",
    }
    for body, reason in bodies.items():
        start = time.monotonic()
        request = urllib.request.Request(f"{server.url}/chat/completions", body.encode())
        request.add_header("Content-Type", "application/json")
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request)
        answer = json.load(refused.value)
        assert refused.value.code == 400 and reason in answer["error"]["message"], answer
        assert len(answer["error"]["message"]) < 500
        assert time.monotonic() - start < 5


def test_no_address_or_file_is_opened(client, server, tmp_path):
    path = tmp_path / "secret.png"
    Image.new("RGB", (8, 8)).save(path)
    # Its own health page stands for a host that only the server can reach
    for url in (
        str(path),
        path.as_uri(),
        server.url,
        server.url.replace("http", "HTTPS"),
        "ftp://127.0.0.1/a.png",
        "",
    ):
        with pytest.raises(openai.BadRequestError, match="opens no other addresses and no files"):
            ask(client, asked("?", [url]))


def test_other_models_and_paths(client, server):
    for name in ("gpt-4o", "../tiny", "x" * 1000):
        with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
            ask(client, asked("?"), model=name)
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="tiny", prompt="?")
    for path in ("/../load_model", "/../reset"):
        with pytest.raises(openai.NotFoundError):
            client.post(path, body={"model": "tiny"}, cast_to=object)


def test_silent_and_slow_clients_hold_nobody_up(server, client, plain):
    """Two hundred connections without a request, and some with a part of one, are closed after a while."""
    host, port = server.url.split("/")[2].split(":")
    parts = [b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: "]
    silent = [socket.create_connection((host, int(port))) for _ in range(200)]
    try:
        for index, connection in enumerate(silent):
            connection.sendall(parts[index % 3])
        assert text_of(ask(client, asked("Still there?"))) == plain([user_message("Still there?")])
        end = time.monotonic() + 30
        for connection in silent:
            connection.settimeout(max(0.1, end - time.monotonic()))
            assert connection.recv(1) == b"", "closed by the server"
    finally:
        for connection in silent:
            connection.close()


def test_pages_of_other_origins_are_refused(client):
    """What a browser would send for a page that is not the server's: another host name, or JSON called text."""
    for headers, reason in [({"Host": "example.com"}, "Invalid host"), ({"Content-Type": "text/plain"}, "valid dict")]:
        with pytest.raises(openai.BadRequestError) as refused:
            ask(client, asked("?"), extra_headers=headers)
        assert reason in refused.value.response.text


def test_after_all_that_it_answers(client, plain):
    assert text_of(ask(client, asked("Still there?"))) == plain([user_message("Still there?")])


def test_a_signal_ends_it_in_time(checkpoint):
    """While images are decoded that take seconds, and while half a request is there."""
    Image.linear_gradient("L").resize((4000, 4000)).convert("RGB").save(file := io.BytesIO(), "JPEG", progressive=True)
    content = file.getvalue()
    last_scan = content[content.rindex(b"\xff\xda") : -2]
    slow = BASE64 + base64.b64encode(content[:-2] + last_scan * 80 + content[-2:]).decode()
    body = json.dumps({"model": "tiny", "messages": [asked("?", [slow] * 4)]}).encode()
    command = [*MODULE, str(checkpoint), "--name", "tiny", "--port", "0"]
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        address = ("127.0.0.1", int(re.search(r":(\d+)/v1", process.stdout.readline())[1]))
        with socket.create_connection(address) as whole, socket.create_connection(address) as half:
            whole.sendall(request)
            half.sendall(request[:300])
            time.sleep(1)
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == -signal.SIGTERM
            assert b"503 Service Unavailable" in whole.recv(1000)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize(("arguments", "message"), [(["--port", "0"], "config.json"), (["--port", "70000"], "port")])
def test_what_cannot_be_served(arguments, message, tmp_path, capsys):
    assert serve.main([str(tmp_path), *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_missing_packages_are_named(tmp_path):
    """In a process where fastapi cannot be imported."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['fastapi'] = None\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    result = subprocess.run([*MODULE, "nowhere"], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1 and result.stdout == ""
    assert 'pip install "movekd[serve]"' in result.stderr and "Traceback" not in result.stderr
