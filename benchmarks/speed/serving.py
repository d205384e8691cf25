"""
Requests a second and time to the first token at 1, 4 and 16 clients: our server, and vLLM on the same checkpoint.

    python -m benchmarks.speed.serving --vllm-python ~/vllm/bin/python

A model of some 100 M parameters with random weights. Every client asks about a picture of its own, one request after
the other, with answers that are streamed. vLLM is installed in an environment of its own (docs/serving.md).
"""

import argparse
import base64
import io
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.speed.options import parser


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    flags = parser(__doc__, repeats=2)
    flags.add_argument("--vllm-python", help="interpreter of an environment with vLLM; our server alone without it")
    flags.add_argument("--new_tokens", type=int, default=64)
    flags.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    return flags.parse_args(arguments)


# Before the imports below, which take seconds
if __name__ == "__main__":
    parse_arguments()

import numpy as np
import openai
import torch
from PIL import Image
from transformers import AutoTokenizer

from benchmarks.speed.measure import ROOT, Row, report, start
from benchmarks.speed.models import TOKENIZER, TOY_CLIP, vision_language_model


CLIP = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6}
CLIP |= {"image_size": 224, "patch_size": 16, "projection_dim": 384}
LANGUAGE = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 24, "num_attention_heads": 9}
LANGUAGE |= {"num_key_value_heads": 3, "max_position_embeddings": 1024}
TOY_LANGUAGE = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
START_SECONDS = 900


@torch.no_grad()
def save(folder: str, toy: bool, dtype: str) -> int:
    """Save the checkpoint; returns the number of its parameters."""
    language = (TOY_LANGUAGE if toy else LANGUAGE) | {"vocab_size": len(AutoTokenizer.from_pretrained(TOKENIZER))}
    model, processor = vision_language_model(TOY_CLIP if toy else CLIP, language)
    # Its logit is 0, which is not the largest of many random ones: answers have their full length
    model.lm_head.weight[processor.tokenizer.eos_token_id] = 0
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    processor.save_pretrained(folder)
    return model.num_parameters()


@contextmanager
def served(command: Sequence[str | Path], threads: int) -> Iterator[openai.OpenAI]:
    """A client of a server that is started with `--port` and ended after the block."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [*command, "--port", str(port)], env=environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
        )
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=600)
        try:
            end = time.monotonic() + START_SECONDS
            while not _answers(client):
                if process.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    raise RuntimeError(f"The server did not start: {list(command)}\n{log.read()[-4000:]}")
                time.sleep(1)
            yield client
        finally:
            process.terminate()
            process.wait(60)


def _answers(client: openai.OpenAI) -> bool:
    try:
        client.models.list()
    except openai.APIConnectionError:
        return False
    return True


def picture(seed: int) -> str:
    """Noise, as a data URL."""
    buffer = io.BytesIO()
    noise = np.random.default_rng(seed).integers(256, size=(224, 224, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def ask(client: openai.OpenAI, model: str, seed: int, new_tokens: int) -> float:
    """Seconds to the first token of a streamed answer, which is read to its end."""
    content = [{"type": "image_url", "image_url": {"url": picture(seed)}}, {"type": "text", "text": "What is there?"}]
    messages: Any = [{"role": "user", "content": content}]
    start, first = time.perf_counter(), 0.0
    stream: Any = client.chat.completions.create(
        model=model, messages=messages, max_tokens=new_tokens, temperature=0, stream=True
    )
    for chunk in stream:
        if not first and chunk.choices and chunk.choices[0].delta.content:
            first = time.perf_counter() - start
    return first


def load(client: openai.OpenAI, model: str, clients: int, requests: int, new_tokens: int) -> tuple[float, float]:
    """Requests a second of all clients, and the median time to the first token."""
    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        seeds = range(1000 * clients, 1000 * clients + requests)
        firsts = list(pool.map(lambda seed: ask(client, model, seed, new_tokens), seeds))
    return requests / (time.perf_counter() - start), statistics.median(firsts)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    start(options)
    new_tokens = 4 if options.toy else options.new_tokens
    with tempfile.TemporaryDirectory() as folder:
        parameters = save(folder, options.toy, options.dtype)
        ours = [sys.executable, "-m", "modeling_movekd.serve", folder, "--device", options.device]
        servers: dict[str, list[str]] = {"ours": [*ours, "--dtype", options.dtype]}
        if options.vllm_python:
            command = [options.vllm_python, "-I", "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
            servers["vLLM"] = [*command, "--trust-remote-code", "--dtype", options.dtype, "--host", "127.0.0.1"]
        found = {}
        for name, command in servers.items():
            with served(command, options.threads) as client:
                load(client, folder, 1, 2, new_tokens)  # warm up
                for clients in options.clients:
                    requests = max(4, options.repeats * clients)
                    found[name, clients] = load(client, folder, clients, requests, new_tokens)
    rows = []
    for clients in options.clients:
        for index, (what, unit) in enumerate((("requests a second", "/s"), ("time to the first token", "s"))):
            rival = found["vLLM", clients][index] if options.vllm_python else None
            label = f"{clients} client{'s' * (clients > 1)}, {what}"
            rows.append(Row(label, found["ours", clients][index], rival, unit, note="rival: vLLM" if rival else ""))
    context = {"parameters": f"{parameters / 1e6:.0f} M", "new tokens": new_tokens, "dtype": options.dtype}
    report("Serving", rows, context, options.out)


if __name__ == "__main__":
    main()
