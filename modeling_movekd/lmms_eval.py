"""
The model `movekd` of lmms-eval, which finds it by the entry point `lmms_eval.models`:

    python -m lmms_eval --model movekd --model_args pretrained=CHECKPOINT --tasks pope --batch_size 8 --output_path out

Prefer `python -m benchmarks.evaluate` for the paper's benchmarks: lmms-eval's own command exits with 0 after a crash.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image
from tqdm import tqdm

from .chat_templates import IMAGE_TOKEN
from .images import decode_image
from .inference import answer_batch, check_length, load_checkpoint, longest_context
from .predict_answers import Answers
from .prompts import prepare


# LLaVA's value, for tasks without one
MAX_NEW_TOKENS = 128


def manifest() -> ModelManifest:
    """Return the model's name and class for lmms-eval's entry point."""
    return ModelManifest(model_id="movekd", chat_class_path=f"{__name__}.MoveKDEvaluation")


class MoveKDEvaluation(lmms):
    """
    A checkpoint that answers the requests of lmms-eval.

    Args:
        pretrained (`str`): Hub id or folder of a whole model.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        device (`str`, *optional*): Defaults to the device that `accelerate launch` gave this process.
        dtype (`str`, *optional*): Name of a torch dtype. Defaults to that of the weights on a GPU, float32 on a CPU.
        batch_size (`int`, *optional*, defaults to 1): Number of requests answered at once.
        max_batch_size (`int`, *optional*): Ignored. lmms-eval's command passes it.
        answers (`str` or `os.PathLike`, *optional*): File of JSON lines for the answers, which lets an interrupted run
            continue. Each process writes a file of its own, with its rank before the suffix.
        identity (`str`, *optional*): Name of the model in `answers`. Defaults to `pretrained` and `revision`, which
            stay the same when the weights in a folder change.

    Raises:
        ValueError: If an argument is wrong, `answers` belong to another model, or the processes are not connected.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        revision: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        answers: str | os.PathLike | None = None,
        identity: str | None = None,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"`batch_size` is {batch_size!r}, expected a positive number; 'auto' is not supported.")
        self.batch_size = int(batch_size)
        on_cpu = torch.device(device).type == "cpu" if device else not torch.cuda.is_available()
        state = PartialState(cpu=on_cpu)  # without `cpu=True`, processes on CPUs would not connect
        expected = int(os.environ.get("WORLD_SIZE", "1"))  # lmms-eval reads the same variable
        if expected != state.num_processes:
            raise ValueError(
                f"{expected} processes were started, but this one knows of {state.num_processes}. Start them with "
                "`accelerate launch`."
            )
        self._rank, self._world_size = state.process_index, state.num_processes
        self.device = torch.device(device or state.device)
        identity = identity or f"{pretrained}@{revision or 'main'}"
        self.answers: Answers | None = None
        if answers is not None:
            path = Path(answers)
            own = path.with_name(f"{path.stem}.{self.rank}{path.suffix}")
            self.answers = Answers(own, identity, path.parent.glob(f"{path.stem}.*{path.suffix}"))
        self.model, self.processor = load_checkpoint(pretrained, revision, self.device, dtype)

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Answer the requests in their order, with each answer cut at the task's stop strings."""
        answers: dict[int, str] = {}
        with tqdm(total=len(requests), desc="Answering", disable=self.rank != 0) as progress:
            for indices, conversations, keys, settings in self._batches(requests, answers, progress):
                texts = self.answer(conversations, settings)
                for index, text, key in zip(indices, texts, keys, strict=True):
                    answers[index] = text
                    if self.answers is not None:
                        request = requests[index]
                        self.answers.add(key, text, task=request.task_name, doc_id=request.doc_id)
                progress.update(len(indices))
        return [answers[index] for index in range(len(requests))]

    def _batches(
        self, requests: Sequence[Instance], answers: dict[int, str], progress: tqdm
    ) -> Iterator[tuple[list[int], list[list[dict[str, Any]]], list[str], dict[str, Any]]]:
        """
        Yield batches of one task and one set of generation settings: indices, conversations, keys and settings.

        Answers of an interrupted run go straight into `answers`.
        """
        groups: dict[tuple[str, str], list[int]] = {}
        for index, request in enumerate(requests):
            _, _, settings, _, task, _ = request.args
            groups.setdefault((task, json.dumps(settings, sort_keys=True, default=str)), []).append(index)
        for members in groups.values():
            batch: list[tuple[int, list[dict[str, Any]], str]] = []
            for index in members:
                _, to_messages, settings, row, task, split = requests[index].args
                conversation = to_conversation(to_messages(self.task_dict[task][split][row]))
                key = request_key(task, split, row, conversation, settings)
                # A sampled answer must not be used for an equal request.
                found = None if self.answers is None or settings.get("temperature") else self.answers.get(key)
                if found is not None:
                    answers[index] = found
                    progress.update(1)
                else:
                    batch.append((index, conversation, key))
                if batch and (len(batch) == self.batch_size or index == members[-1]):
                    indices, conversations, keys = (list(part) for part in zip(*batch, strict=True))
                    yield indices, conversations, keys, settings
                    batch = []

    def answer(self, conversations: Sequence[Sequence[Mapping[str, Any]]], settings: Mapping[str, Any]) -> list[str]:
        """
        Answer a batch of conversations.

        Args:
            conversations (`Sequence`): Conversations in the form that chat templates take.
            settings (`Mapping[str, Any]`): The task's `generation_kwargs`. Sampling needs a temperature above 0, and
                `max_new_tokens` is cut to the room that the context leaves.

        Raises:
            ValueError: If the longest prompt leaves no room for an answer.
        """
        generation = {"max_new_tokens": MAX_NEW_TOKENS, "num_beams": 1, **settings}
        generation.pop("image_aspect_ratio", None)  # ignored, as by lmms-eval's LLaVA
        until = generation.pop("until", None) or []
        temperature, top_p = generation.pop("temperature", None) or 0.0, generation.pop("top_p", None)
        generation["do_sample"] = temperature > 0 and generation.get("do_sample") is not False
        if generation["do_sample"]:
            generation |= {"temperature": temperature} | ({"top_p": top_p} if top_p else {})
        inputs = prepare(self.processor, conversations, self.model.device)
        check_length(self.model, inputs, 1)
        if (longest := longest_context(self.model)) is not None:
            room = longest - inputs["input_ids"].shape[1]
            generation["max_new_tokens"] = min(generation["max_new_tokens"], room)
        # The texts are stripped already: lmms-eval's default stop string is an empty line, which may begin an answer.
        texts = answer_batch(self.model, self.processor, inputs, **generation)
        for stop in [until] if isinstance(until, str) else until:
            texts = [text.split(stop)[0] if stop else text for text in texts]
        return [text.strip() for text in texts]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("Tasks that compare likelihoods cannot be run. Choose a task with text answers.")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise NotImplementedError("Tasks of several rounds cannot be run. Choose a task with a single answer.")


def to_conversation(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Convert lmms-eval's messages to the form that chat templates take."""
    conversation = []
    for message in messages:
        content: list[dict[str, Any]] = []
        for part in message["content"]:
            if part["type"] == "text":
                if IMAGE_TOKEN in part["text"]:
                    raise ValueError(f"A text of the task contains {IMAGE_TOKEN}: {part['text']!r}.")
                content.append({"type": "text", "text": part["text"]})
            elif part["type"] == "image":
                image = part["url"]
                image = decode_image(image if isinstance(image, Image.Image) else Path(image))
                content.append({"type": "image", "image": image})
            else:
                raise ValueError(f"The task contains {part['type']!r}; the model takes text and images.")
        conversation.append({"role": message["role"], "content": content})
    return conversation


def request_key(
    task: str, split: str, row: Any, conversation: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
) -> str:
    """Return a SHA-256 of everything besides the model that an answer depends on."""
    digest = hashlib.sha256(json.dumps([task, split, row, dict(settings)], sort_keys=True, default=str).encode())
    for message in conversation:
        digest.update(f"\0{message['role']}".encode())
        for part in message["content"]:
            if part["type"] == "image":
                digest.update(f"\0image {part['image'].size}".encode() + part["image"].tobytes())
            else:
                digest.update(f"\0text {part['text']}".encode())
    return digest.hexdigest()
