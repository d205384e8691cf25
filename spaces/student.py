"""Load the checkpoint, stream its answers, measure its speed and draw its pictures."""

import json
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from prompts import prepare
from transformers import (
    AutoConfig,
    AutoModel,
    AutoProcessor,
    PreTrainedModel,
    ProcessorMixin,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)
from transformers.generation.streamers import BaseStreamer
from zero_gpu import ON_ZERO_GPU, on_gpu


MEASURED_TOKENS = 32


def load_student(model_id: str, revision: str | None) -> "Student":
    """Load a whole model with the code in its checkpoint. A repository needs a revision, since its code can change."""
    is_folder = Path(model_id).is_dir()
    if not is_folder and not revision:
        raise ValueError(
            f"MODEL_ID is {model_id} and MODEL_REVISION is not set. The checkpoint's own code will run here: name a "
            "commit that you trust, or a branch if you trust its future commits."
        )
    kind = json.loads(read_text(model_id, revision, "config.json") or "{}").get("model_type")
    if kind != "movekd":
        hint = " It is the vision encoder alone." if kind == "movekd_vision" else ""
        raise ValueError(
            f"{model_id} is a {kind!r} checkpoint; 'movekd', a whole vision-language model, is needed.{hint}"
        )
    settings: dict[str, Any] = {"revision": None if is_folder else revision, "trust_remote_code": True}
    config = AutoConfig.from_pretrained(model_id, **settings)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = "auto" if device.type == "cuda" else torch.float32
    model = AutoModel.from_pretrained(model_id, config=config, dtype=dtype, **settings).to(device).eval()
    if hasattr(model, "fold_experts") and not ON_ZERO_GPU:  # ZeroGPU moves the weights later
        model.fold_experts()
    # Training resizes with PIL. Pixels resized by torchvision differ by up to 0.015.
    processor = AutoProcessor.from_pretrained(model_id, backend="pil", **settings)
    metadata = json.loads(read_text(model_id, revision, "training_facts.json") or "{}")
    return Student(model_id, settings["revision"], model, processor, metadata)


def read_text(model_id: str, revision: str | None, name: str) -> str | None:
    """Read a file of a checkpoint in a folder or on the Hub, or return `None` if it has no such file."""
    folder = Path(model_id)
    if folder.is_dir():
        return (folder / name).read_text(encoding="utf-8") if (folder / name).is_file() else None
    try:
        return Path(hf_hub_download(model_id, name, revision=revision)).read_text(encoding="utf-8")
    except EntryNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"{model_id} at {revision} cannot be read: {error}") from error


class StopWhen(StoppingCriteria):
    """Ends `generate` after the current token once the event is set."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), dtype=torch.bool, device=input_ids.device)


class Clock(BaseStreamer):
    """Records the time of each token. The first entry is the prompt's."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class Student:
    """
    A loaded checkpoint. On ZeroGPU, each call of `stream`, `speed` and `visualize` runs in its own process.

    Args:
        model_id (`str`): Hub id or folder.
        revision (`str`, *optional*): Revision of a Hub repository.
        model (`PreTrainedModel`): The model.
        processor (`ProcessorMixin`): Its processor.
        metadata (`dict`): The checkpoint's metadata file, or an empty dict.

    Attributes:
        encoders (`list[Encoder]`): Other encoders to compare with.
    """

    def __init__(
        self,
        model_id: str,
        revision: str | None,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        metadata: dict[str, Any],
    ) -> None:
        self.model_id, self.revision, self.metadata = model_id, revision, metadata
        self.model, self.processor = model, processor
        text_config = model.config.get_text_config()
        self.context_length: int | None = getattr(text_config, "max_position_embeddings", None)
        self.encoders: list[Any] = []
        self.stream = on_gpu(self._stream)
        self.speed = on_gpu(self._speed)
        self.visualize = on_gpu(self._visualize)

    def encode(self, messages: Sequence[dict[str, Any]], max_new_tokens: int) -> dict[str, torch.Tensor]:
        """Turn a conversation into the model's inputs, and refuse one that is longer than the context."""
        inputs = prepare(self.processor, [messages], self.model.device)
        length = inputs["input_ids"].shape[1]
        if self.context_length is not None and length + max_new_tokens > self.context_length:
            raise ValueError(
                f"The conversation has {length} tokens and the answer may have {max_new_tokens}, but the model takes "
                f"{self.context_length} in all. Clear the conversation, ask something shorter, or lower the length."
            )
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        return inputs

    def unknown_words(self, text: str) -> bool:
        """Return whether the vocabulary lacks words of the text."""
        tokenizer = self.processor.tokenizer
        return (
            tokenizer.unk_token_id is not None
            and tokenizer.unk_token_id in tokenizer(text, verbose=False)["input_ids"]
        )

    def _stream(
        self, messages: Sequence[dict[str, Any]], max_new_tokens: int, temperature: float, top_p: float
    ) -> Iterator[str]:
        """Yield the answer so far after every word. Closing the iterator ends the generation."""
        inputs = self.encode(messages, max_new_tokens)
        settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
        if temperature > 0:
            settings |= {"temperature": temperature, "top_p": top_p}
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        stop, errors = threading.Event(), []

        def generate() -> None:
            try:
                criteria = StoppingCriteriaList([StopWhen(stop)])
                with torch.inference_mode():
                    self.model.generate(**inputs, **settings, streamer=streamer, stopping_criteria=criteria)
            except Exception as error:
                errors.append(error)
                streamer.end()  # otherwise the loop below would never end

        thread = threading.Thread(target=generate, name="generate")
        thread.start()
        answer = ""
        try:
            for piece in streamer:
                answer += piece
                if piece:
                    yield answer.strip()
        finally:
            stop.set()
            thread.join()
        if errors:
            raise errors[0]
        if not answer.strip():
            yield ""

    @torch.inference_mode()
    def _speed(self, messages: Sequence[dict[str, Any]]) -> tuple[float, float, int]:
        """Return the seconds to the first token (with the image's encoding), tokens per second, and their number."""
        room = (self.context_length or MEASURED_TOKENS + 1) - self.encode(messages, 0)["input_ids"].shape[1]
        count = min(MEASURED_TOKENS, room)
        for tokens in (2, count):  # the first run warms up
            start, clock = time.perf_counter(), Clock()
            inputs = self.encode(messages, tokens)
            settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
            self.model.generate(**inputs, **settings, streamer=clock)
        first, last = clock.times[1], clock.times[-1]
        return first - start, (len(clock.times) - 2) / (last - first), count

    @torch.inference_mode()
    def _visualize(self, image: Any, layer: int) -> Any:
        """Draw one layer (from 0) and the other encoders by the model's `visualize`."""
        if not hasattr(self.model, "visualize"):
            raise ValueError(f"The code in {self.model_id} draws no pictures. Save the checkpoint again to renew it.")
        processor = self.processor.image_processor
        pixels = processor(image, return_tensors="pt")["pixel_values"].to(self.model.device, self.model.dtype)
        others = {encoder.name: encoder.features(image, layer) for encoder in self.encoders}
        given = {"other_tokens": others} if others else {}
        mean, std = tuple(processor.image_mean), tuple(processor.image_std)
        return self.model.visualize(pixels, layer, image_mean=mean, image_std=std, **given)
