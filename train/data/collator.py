"""Collates rows to a batch: ids, labels, the student's pixels, and the teachers' pixels or cached features."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from transformers import ProcessorMixin

from modeling_movekd.chat_templates import has_answer_markers
from train.data.conversations import STAND_IN
from train.data.image_collator import (
    black_image,
    check_geometry,
    crop_facts,
    decode_rows,
    is_anyres,
    named_problems,
    row_numbers,
    teacher_pixels,
)
from train.teachers.cached import FeatureCache
from train.teachers.preprocessing import TeacherPreprocessor


IGNORE_INDEX = -100
LABEL_RULES = ("answers", "released")
DISTILL_TILES = ("base", "all")
# Between a question and its answer in `vicuna_v1`
ANSWER_SEPARATOR = " ASSISTANT: "


def released_label_mask(text: str, input_ids: Sequence[int], tokenizer: Any, max_length: int | None) -> list[bool]:
    """
    The trained tokens of a `vicuna_v1` conversation under the rule of the original code.

    The original code tokenizes each round separately and adds up the lengths. If the sum equals the number of tokens,
    the answers and their end tokens are trained on, else nothing. The sum differs after an empty turn, if a text
    contains the end token or the heading of an answer, or if the tokenizer splits a separate round differently.

    Args:
        text (`str`): Rendered conversation, with one placeholder per image. Its beginning-of-sequence token counts for
            each round, which the original code tokenizes with one.
        input_ids (`Sequence[int]`): Its ids, one per image, before truncation to `max_length`.
        tokenizer: The tokenizer of the ids.
        max_length (`int`, *optional*): From this length on, a different sum is ignored.

    Returns:
        A boolean per id.
    """
    written_bos = tokenizer.bos_token if tokenizer.bos_token and text.startswith(tokenizer.bos_token) else ""
    text = text.removeprefix(written_bos)
    rounds = text.split(tokenizer.eos_token) if tokenizer.eos_token else [text]
    mask = [False] * len(input_ids)
    position = 1
    for number, round_text in enumerate(rounds):
        parts = round_text.split(ANSWER_SEPARATOR)
        if len(parts) != 2:
            break
        # In the whole text a round after the first has no prefix, unless the tokenizer is a legacy one
        surplus = 1 if number > 0 and not getattr(tokenizer, "legacy", True) else 0
        surplus -= bool(written_bos)
        round_length = len(tokenizer(round_text).input_ids) - surplus
        # Without the first token, counted by `position`, and the space that belongs to the answer
        question_length = len(tokenizer(parts[0] + ANSWER_SEPARATOR).input_ids) - 2 - surplus
        for index in range(position + question_length, min(position + round_length, len(mask))):
            mask[index] = True
        position += round_length
    counted = sum(token != tokenizer.pad_token_id for token in input_ids)
    if position != counted and (max_length is None or position < max_length):
        return [False] * len(input_ids)
    return mask


@dataclass
class MoveKDCollator:
    """
    Collates rows of `messages` and `images`. Can be pickled, so that loader workers decode, crop and resize.

    Under the geometry `"shared"` every teacher gets the crop of the student's image processor before its resize, so
    that the patches of all towers cover the same pixels: the image padded to a square, the whole image for anyres, or
    the center square.

    Args:
        processor (`ProcessorMixin`): LLaVA processor whose chat template marks answers by `{% generation %}`.
        teacher_preprocessors (`Mapping[str, TeacherPreprocessor]`, *optional*): By teacher.
        max_length (`int`, *optional*): Longest row in tokens, image tokens included. Longer text is truncated.
        geometry (`str`, defaults to `"shared"`): `"shared"`, or `"per_teacher"` as in the original code: each teacher
            cuts the image itself, padded to a square of the teacher's mean color if the student pads.
        labels (`str`, defaults to `"answers"`): `"answers"`, or `"released"` for [`released_label_mask`].
        distill_text_only_rows (`bool`, defaults to `False`): Give each text-only row a black image with weight 1, as
            in the original code. No text refers to it.
        apply_orientation (`bool`, defaults to `True`): Turn images as their EXIF orientation says.
        distill_tiles (`str`, defaults to `"base"`): `"base"`, or `"all"`: with anyres the teachers also get each tile.
        pad_to_multiple_of (`int`, *optional*): Pad the batch to a multiple of this many tokens.
        feature_cache (`FeatureCache`, *optional*): Read the teachers' features instead of making their pixels.
        max_positions (`int`, *optional*): Positions of the language model, which a row must fit into.

    Returns (of a call):
        `input_ids`, `attention_mask`, `labels`: int64 `(batch_size, length)`, padded on the right. Labels are -100
            outside the answers.
        `pixel_values`: float32 `(num_images, 3, size, size)`; for anyres `(num_images, num_crops, 3, size, size)`,
            with `image_sizes`, int64 `(num_images, 2)`. The images of the text come first, then `num_blank_images`
            black images. Every batch has an image, so that all processes run the vision path.
        `teacher_pixel_values`: By teacher, uint8 `(num_images, 3, size, size)`, see
            [`~train.data.image_collator.teacher_pixels`]. With all tiles the first dimension counts crops: of each
            image the whole image, then its tiles row by row.
        `cached_features`: With a feature cache instead, by teacher the result of `FeatureCache.read`.
        `image_weights`: float32 `(num_images,)`, 0 for the black image of a batch without any other image, else 1.
        `bad_rows`: List of (row, reason) for the rows that cannot be used: an image cannot be decoded, the image
            tokens exceed `max_length`, the row exceeds `max_positions`, no token of it is trained, or it has a
            `problem`. Such a row is replaced by a short text without labels; a row that the original label rule skips
            is only listed, and its image is distilled as in the original code. The caller records the list in
            [`~train.data.bad_rows.BadRows`].
        `image_rows`: int64 `(num_images,)`, the position in the batch of each image's row.
    """

    processor: ProcessorMixin
    teacher_preprocessors: Mapping[str, TeacherPreprocessor] = field(default_factory=dict)
    max_length: int | None = None
    geometry: str = "shared"
    labels: str = "answers"
    distill_text_only_rows: bool = False
    apply_orientation: bool = True
    distill_tiles: str = "base"
    pad_to_multiple_of: int | None = None
    feature_cache: FeatureCache | None = None
    max_positions: int | None = None

    def __post_init__(self) -> None:
        check_geometry(self.geometry)
        if self.labels not in LABEL_RULES:
            raise ValueError(f"Unknown labels {self.labels!r}: choose from {LABEL_RULES}.")
        if self.distill_tiles not in DISTILL_TILES:
            raise ValueError(f"Unknown distill_tiles {self.distill_tiles!r}: choose from {DISTILL_TILES}.")
        if self.distill_tiles == "all" and not self._is_anyres:
            raise ValueError(
                "`distill_tiles` is 'all', but the student's image processor "
                f"({type(self.processor.image_processor).__name__}) cuts no tiles: train a student with "
                "`image_aspect_ratio: anyres`, or set `distill_tiles: base`."
            )
        if self.distill_tiles == "all" and (self.geometry != "shared" or self.feature_cache is not None):
            raise ValueError(
                f"`distill_tiles` is 'all', with the geometry {self.geometry!r} and "
                f"{'a' if self.feature_cache is not None else 'no'} feature cache. Use the geometry 'shared' and run "
                "the teachers, or set `distill_tiles: base`."
            )
        if not has_answer_markers(self.processor.chat_template):
            raise ValueError(
                "The processor's chat template has no {% generation %} markers, so no token would be trained on. Set "
                "a template with modeling_movekd.chat_templates.set_chat_template."
            )
        if self.feature_cache is not None:
            self.feature_cache.check_geometry(self.teacher_geometry)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        images, problems = decode_rows(rows, self.apply_orientation)
        return self._collate(rows, images, problems)

    def with_images(
        self, messages: Sequence[Mapping[str, Any]], images: list[Image.Image], number: int
    ) -> list[dict[str, Any]]:
        """
        Put images in place of a conversation's placeholders.

        Args:
            messages (`Sequence[Mapping[str, Any]]`): A row's messages; contents are strings or lists of parts.
            images (`list[PIL.Image.Image]`): The row's images, in order.
            number (`int`): The row, for the error.

        Raises:
            ValueError: if there are more or fewer placeholders than images.
        """
        remaining = list(images)
        placeholders = 0
        filled = []
        for message in messages:
            parts = []
            content = message["content"]
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                if part["type"] == "image":
                    placeholders += 1
                    part = {"type": "image", "image": remaining.pop(0)} if remaining else part
                else:
                    placeholders += part["text"].count(self.processor.image_token)
                parts.append(part)
            filled.append({"role": message["role"], "content": parts})
        if placeholders != len(images):
            raise ValueError(
                f"Row {number} has {placeholders} image placeholders and {len(images)} images. Read the rows with "
                "train.data.datasets.load_conversations, which skips such rows."
            )
        return filled

    def _collate(
        self, rows: Sequence[Mapping[str, Any]], images: list[list[Image.Image]], problems: dict[int, str]
    ) -> dict[str, Any]:
        numbers = row_numbers(rows)
        conversations = [
            self.with_images(STAND_IN if position in problems else row["messages"], of_row, numbers[position])
            for position, (row, of_row) in enumerate(zip(rows, images, strict=True))
        ]
        encoded = self.processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            processor_kwargs={
                "padding": True,
                "padding_side": "right",
                "pad_to_multiple_of": self.pad_to_multiple_of,
            },
        )
        # Tensors are made afterwards: transformers loops over each token's offsets, which is slow on tensors
        encoded = encoded.convert_to_tensors("pt")
        image_rows = [position for position, of_row in enumerate(images) for _ in of_row]
        is_image = encoded["input_ids"] == self.processor.image_token_id
        self._check_image_tokens(encoded, is_image, image_rows, numbers)

        if too_long := self._too_long(is_image, encoded["attention_mask"]):
            return self._without(rows, images, problems | too_long)

        trained = encoded["assistant_masks"].bool()
        if self.labels == "released" and ANSWER_SEPARATOR.strip() in self.processor.chat_template:
            trained = self._released(conversations, encoded["input_ids"], is_image)
        trained = trained & encoded["attention_mask"].bool() & ~is_image
        untrained = self._untrained(trained, problems)
        if untrained and self.labels == "answers":
            return self._without(rows, images, problems | untrained)
        trained[list(problems)] = False
        batch: dict[str, Any] = {
            "input_ids": encoded["input_ids"],
            "attention_mask": encoded["attention_mask"],
            "labels": encoded["input_ids"].masked_fill(~trained, IGNORE_INDEX),
        }
        if self.max_length is not None:
            batch = {name: values[:, : self.max_length] for name, values in batch.items()}
        batch["bad_rows"] = named_problems(rows, problems | untrained)
        flat = [image for of_row in images for image in of_row]
        black_rows = []
        if self.distill_text_only_rows:
            black_rows = [number for number, of_row in enumerate(images) if not of_row and number not in problems]
        batch |= self._pixels(flat, encoded, image_rows, black_rows)
        if self.feature_cache is not None:
            shown = [(number, row["images"]) for number, row, kept in zip(numbers, rows, images, strict=True) if kept]
            batch["cached_features"] = self.feature_cache.read(shown, batch["num_blank_images"])
        return batch

    def _without(
        self, rows: Sequence[Mapping[str, Any]], images: list[list[Image.Image]], problems: dict[int, str]
    ) -> dict[str, Any]:
        kept = [[] if position in problems else of_row for position, of_row in enumerate(images)]
        return self._collate(rows, kept, problems)

    def _pixels(
        self, images: list[Image.Image], encoded: Mapping[str, Any], image_rows: list[int], black_rows: list[int]
    ) -> dict[str, Any]:
        """Pixels of the images of the text, then of a black image for each of `black_rows`; at least one image."""
        pixels = encoded
        blank_rows = black_rows or ([] if images else [0])
        if blank_rows:
            images = [*images, *[black_image(self.processor.image_processor)] * len(blank_rows)]
            pixels = self.processor(images=images, return_tensors="pt")
        weights = torch.ones(len(images))
        weights[len(image_rows) :] = float(bool(black_rows))
        batch = {
            "pixel_values": pixels["pixel_values"],
            "image_weights": weights,
            "num_blank_images": len(blank_rows),
            "image_rows": torch.tensor([*image_rows, *blank_rows], dtype=torch.long),
        }
        if "image_sizes" in pixels:
            batch["image_sizes"] = pixels["image_sizes"]
        if self.teacher_preprocessors:
            batch["teacher_pixel_values"] = teacher_pixels(
                images,
                self.teacher_preprocessors,
                self.processor.image_processor,
                self.geometry,
                tiles=self.distill_tiles == "all",
            )
        return batch

    @property
    def teacher_geometry(self) -> dict[str, Any]:
        """How images are cut for the teachers, see [`~train.data.image_collator.crop_facts`]."""
        return crop_facts(self.processor.image_processor, self.geometry, self.apply_orientation)

    @property
    def _is_anyres(self) -> bool:
        return is_anyres(self.processor.image_processor)

    def _check_image_tokens(
        self, encoded: Mapping[str, Any], is_image: torch.Tensor, image_rows: list[int], numbers: list[int]
    ) -> None:
        """Check that each row has as many image tokens as the processor makes of its images."""
        expected = [0] * len(numbers)
        for index, position in enumerate(image_rows):
            expected[position] += self.processor.replace_image_token(encoded, index).count(self.processor.image_token)
        for found, wanted, number in zip(is_image.sum(dim=1).tolist(), expected, numbers, strict=True):
            if found != wanted:
                raise ValueError(
                    f"Row {number} has {found} image tokens instead of {wanted}: the chat template lost or added an "
                    "image. Use a template of modeling_movekd.chat_templates."
                )

    def _too_long(self, is_image: torch.Tensor, attention_mask: torch.Tensor) -> dict[int, str]:
        """The rows whose image tokens exceed `max_length`, or that exceed `max_positions`, by position."""
        problems = {}
        for position, (of_row, length) in enumerate(zip(is_image, attention_mask.sum(dim=1).tolist(), strict=True)):
            columns = of_row.nonzero()
            needed = int(columns[-1]) + 1 if len(columns) else 0
            kept = length if self.max_length is None else min(length, self.max_length)
            if self.max_length is not None and needed > self.max_length:
                problems[position] = f"its image tokens end at token {needed}, above max_length {self.max_length}"
            elif self.max_positions is not None and kept > self.max_positions:
                problems[position] = f"it has {kept} tokens, but the language model takes {self.max_positions}"
        return problems

    def _untrained(self, trained: torch.Tensor, problems: Mapping[int, str]) -> dict[int, str]:
        """The other rows without a trained token, by position."""
        reasons = {}
        for position in range(len(trained)):
            if position in problems or trained[position, : self.max_length].any():
                continue
            if trained[position].any():
                reasons[position] = f"max_length {self.max_length} cuts off its answers"
            elif self.labels == "released":
                reasons[position] = "the label rule of the original code trains on no token of it"
            else:
                reasons[position] = "its answers have no token"
        return reasons

    def _released(
        self, conversations: list[list[dict[str, Any]]], input_ids: torch.Tensor, is_image: torch.Tensor
    ) -> torch.Tensor:
        tokenizer = self.processor.tokenizer
        texts = self.processor.apply_chat_template(conversations, tokenize=False)
        trained = torch.zeros_like(is_image)
        for position, text in enumerate(texts):
            short_ids = tokenizer(text).input_ids
            # The original code truncates a text-only row before it counts, and a row with images after
            if self.processor.image_token_id not in short_ids:
                short_ids = short_ids[: self.max_length]
            mask = released_label_mask(text, short_ids, tokenizer, self.max_length)
            # An image is many tokens in the batch and one token here; neither is trained on
            words = [
                keep for keep, token in zip(mask, short_ids, strict=True) if token != self.processor.image_token_id
            ]
            columns = (~is_image[position]).nonzero().flatten()[: len(words)]
            trained[position, columns] = torch.tensor(words, dtype=torch.bool)
        return trained
