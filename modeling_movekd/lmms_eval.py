"""
A checkpoint as a model of lmms-eval, found by the entry point `lmms_eval.models`:

    python -m lmms_eval --model movekd --model_args pretrained=CHECKPOINT --tasks pope --batch_size 8 --output_path out

`python -m benchmarks.evaluate` runs the paper's benchmarks with it, and fails where lmms-eval's own command line,
after a crash, exits as if nothing had happened.
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
from .inference import check_length, load_checkpoint, longest_context, prepare
from .predict_answers import Answers


# LLaVA's, for tasks that state none
MAX_NEW_TOKENS = 128


def manifest() -> ModelManifest:
    """What the entry point gives lmms-eval: the name `movekd` and the class behind it."""
    return ModelManifest(model_id="movekd", chat_class_path=f"{__name__}.MoveKDEvaluation")


class MoveKDEvaluation(lmms):
    """
    Args:
        pretrained: Hub id or folder of a whole model.
        device: By default that of this process (`accelerate launch` gives each its own).
        dtype: Name of a torch dtype; by default that of the weights on a GPU, float32 on a CPU.
        batch_size: Requests answered at once.
        max_batch_size: Taken from lmms-eval's command line and not used: the batch size is the one given.
        answers: File of JSON lines that takes each answer as it is given. What is in it already is not asked again: an
            interrupted run goes on. Several processes write one file each beside it.
        identity: What tells this model from others whose answers could be in that file; by default `pretrained` and
            `revision`, which do not change when the weights in a folder do.

    Raises:
        ValueError: if the checkpoint is no whole model, the batch size no positive number, `answers` holds those of
            another model, or the processes do not know of each other.
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
            raise ValueError(f"`batch_size` is {batch_size!r}, expected a positive number ('auto' is not known here).")
        self.batch_size = int(batch_size)
        on_cpu = torch.device(device).type == "cpu" if device else not torch.cuda.is_available()
        state = PartialState(cpu=on_cpu)  # unless told so, processes without a GPU would not know of each other
        expected = int(os.environ.get("WORLD_SIZE", "1"))  # what lmms-eval goes by
        if expected != state.num_processes:
            raise ValueError(f"{expected} processes were started, but this one knows of {state.num_processes}.")
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
        """One answer a request, in their order, cut at the task's stop strings."""
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
        Batches of one task and one set of generation settings, with indices, conversations and keys. Requests whose
        answers are there from an interrupted run go straight into `answers`.
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
                # An answer that was drawn by chance stands for itself alone
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

    @torch.inference_mode()
    def answer(self, conversations: Sequence[Sequence[Mapping[str, Any]]], settings: Mapping[str, Any]) -> list[str]:
        """
        Answers to conversations, as one batch.

        Args:
            settings: The task's `generation_kwargs`; without a temperature above 0 the likeliest token is taken. An
                answer ends where the language model's positions do, if `max_new_tokens` reaches beyond.

        Raises:
            ValueError: if there is no room for an answer beside the longest of the prompts.
        """
        generation = {"max_new_tokens": MAX_NEW_TOKENS, "num_beams": 1, **settings}
        generation.pop("image_aspect_ratio", None)  # the checkpoint's own holds, as in lmms-eval's LLaVA
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
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        output = self.model.generate(**inputs, **generation)
        texts = self.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        # lmms-eval's own stop string is an empty line, which may stand before an answer
        texts = [text.strip() for text in texts]
        for stop in [until] if isinstance(until, str) else until:
            texts = [text.split(stop)[0] if stop else text for text in texts]
        return [text.strip() for text in texts]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """
        Raises:
            NotImplementedError: always; lmms-eval itself asks chat models for text alone.
        """
        raise NotImplementedError(
            "Tasks that compare likelihoods cannot be run; choose one that is answered in words."
        )

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """
        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("Tasks of several rounds cannot be run; choose one with a single answer.")


def to_conversation(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """
    lmms-eval's messages in the form chat templates take.

    Raises:
        ValueError: for anything but text and images, an image that cannot be decoded, or a text that says `<image>`.
    """
    conversation = []
    for message in messages:
        content: list[dict[str, Any]] = []
        for part in message["content"]:
            if part["type"] == "text":
                if IMAGE_TOKEN in part["text"]:
                    raise ValueError(f"{IMAGE_TOKEN} stands in a text, where it means an image: {part['text']!r}.")
                content.append({"type": "text", "text": part["text"]})
            elif part["type"] == "image":
                image = part["url"]
                image = image.convert("RGB") if isinstance(image, Image.Image) else decode_image(Path(image))
                content.append({"type": "image", "image": image})
            else:
                raise ValueError(f"The task brings {part['type']!r}; the model takes text and images.")
        conversation.append({"role": message["role"], "content": content})
    return conversation


def request_key(
    task: str, split: str, row: Any, conversation: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
) -> str:
    """What an answer depends on beside the model, as a SHA-256 in hex: text, pixels and generation settings."""
    digest = hashlib.sha256(json.dumps([task, split, row, dict(settings)], sort_keys=True, default=str).encode())
    for message in conversation:
        digest.update(f"\0{message['role']}".encode())
        for part in message["content"]:
            if part["type"] == "image":
                digest.update(f"\0image {part['image'].size}".encode() + part["image"].tobytes())
            else:
                digest.update(f"\0text {part['text']}".encode())
    return digest.hexdigest()
