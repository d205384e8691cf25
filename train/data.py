"""Training rows: LLaVA's `conversations` and TRL's `messages` or `prompt`/`completion` become messages and images."""

import io
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, List, Value, load_dataset, load_from_disk
from PIL import Image as PILImage


logger = logging.getLogger(__name__)

IMAGE_TOKEN = "<image>"
ROLES = {"human": "user", "gpt": "assistant", "system": "system"}

FEATURES = Features(
    {
        "messages": List(
            {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})},
        ),
        "images": List(Image(decode=False)),
        "row_index": Value("int64"),
        "modality_length": Value("int64"),
        "problem": Value("string"),
    }
)


class _BadRow(Exception):
    """A row that cannot be used; its text is the reason."""


def load_conversations(
    source: str | os.PathLike | Dataset | Sequence[Mapping[str, Any]],
    image_folder: str | os.PathLike | None = None,
    split: str = "train",
    max_bad_row_share: float = 0.01,
    num_proc: int | None = None,
) -> Dataset:
    """Read a data set and give its usable rows as messages and undecoded images.

    Every turn with an `<image>` is treated as the authors do: the placeholders are removed, the text is stripped, and
    the images stand in front. A leading answer is dropped. Rows whose placeholders and images disagree, and malformed
    ones, are skipped, counted and reported by index and reason.

    Args:
        source: a LLaVA file (`.json`, `.jsonl`), a `.parquet` file or a folder of them, a folder written by
            `Dataset.save_to_disk`, a data set id of the Hub, a `datasets.Dataset`, or a list of rows. Rows are LLaVA's
            (`conversations`, and `image` as path, picture or list of either) or TRL's (`messages` or
            `prompt`/`completion`, and `images`).
        image_folder: folder that relative image paths start from (default: the folder of a LLaVA file). No path may
            lead out of it.
        split: split of a Hub data set or Parquet folder.
        max_bad_row_share: the largest share of rows that may be skipped, between 0 and 1.
        num_proc: processes that convert the rows of a `datasets.Dataset`.

    Returns:
        `Dataset` with the columns `messages` (role, and content as a list of image and text parts), `images` (a list
        of `{"bytes", "path"}`, empty for a text-only row), `row_index` (position in the source) and `modality_length`
        (words of all turns as written, negative for a text-only row; what `ModalityLengthGroupedSampler` takes).

    Raises:
        ValueError: if more than `max_bad_row_share` of the rows are bad, no row is left, the source is of no known
            kind, or an image path leads out of the image folder.
    """
    if not 0 <= max_bad_row_share <= 1:
        raise ValueError(f"max_bad_row_share is a share between 0 and 1, got {max_bad_row_share}.")
    if isinstance(source, str | os.PathLike) and Path(source).suffix in (".json", ".jsonl"):
        image_folder = Path(source).parent if image_folder is None else image_folder
    rows = _open(source, split)
    folder = None if image_folder is None else os.path.abspath(image_folder)
    if isinstance(rows, Dataset):
        converted = _undecoded(rows).map(
            _convert,
            with_indices=True,
            fn_kwargs={"folder": folder},
            remove_columns=rows.column_names,
            features=FEATURES,
            num_proc=num_proc,
            desc="Reading conversations",
        )
    else:
        converted = Dataset.from_list([_convert(row, index, folder) for index, row in enumerate(rows)], FEATURES)
    return _without_bad_rows(converted, max_bad_row_share)


def _open(source: Any, split: str) -> Dataset | Sequence[Any]:
    if isinstance(source, Dataset):
        return source
    if not isinstance(source, str | os.PathLike):
        return list(source)
    path = Path(source)
    if path.suffix == ".json" and path.is_file():
        rows = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(rows, list):
            raise ValueError(f"{path} holds a JSON {type(rows).__name__}, expected a list of rows.")
        return rows
    if path.suffix == ".jsonl" and path.is_file():
        with path.open(encoding="utf-8") as lines:
            return [json.loads(line) for line in lines if line.strip()]
    if path.suffix == ".parquet" and path.is_file():
        return load_dataset("parquet", data_files=str(path), split="train")
    if path.is_dir() and (path / "state.json").is_file():
        return load_from_disk(str(path))
    if path.is_dir() and (path / "dataset_dict.json").is_file():
        return load_from_disk(str(path))[split]
    if path.exists() and not path.is_dir():
        raise ValueError(f"Cannot read {path}: expected .json, .jsonl or .parquet, a folder, or a data set id.")
    if path.suffix in (".json", ".jsonl", ".parquet"):
        raise ValueError(f"There is no file {path}.")
    return load_dataset(str(source), split=split)


def _undecoded(dataset: Dataset) -> Dataset:
    """The data set with every image column left as bytes or path."""

    def undecoded(feature: Any) -> Any:
        if isinstance(feature, Image):
            return Image(decode=False)
        return List(undecoded(feature.feature)) if isinstance(feature, List) else feature

    for name, feature in dataset.features.items():
        if undecoded(feature) != feature:
            dataset = dataset.cast_column(name, undecoded(feature))
    return dataset


def _without_bad_rows(dataset: Dataset, max_bad_row_share: float) -> Dataset:
    problems = dataset["problem"][:]
    bad = [index for index, problem in enumerate(problems) if problem is not None]
    if bad:
        first = "; ".join(f"row {index}: {problems[index]}" for index in bad[:5])
        report = f"{len(bad)} of {len(problems)} rows cannot be used ({len(bad) / len(problems):.2%}). First: {first}."
        if len(bad) > max_bad_row_share * len(problems):
            raise ValueError(
                f"{report} At most {max_bad_row_share:.2%} may be skipped: repair the data or raise max_bad_row_share."
            )
        logger.warning("%s They are skipped.", report)
        dataset = dataset.select([index for index, problem in enumerate(problems) if problem is None])
    if len(dataset) == 0:
        raise ValueError(f"No row is left of {len(problems)}.")
    return dataset.remove_columns("problem")


def _convert(row: Mapping[str, Any], index: int, folder: str | None) -> dict[str, Any]:
    """One source row in the form of `FEATURES`; a bad row gets its `problem` and nothing else."""
    try:
        if not isinstance(row, Mapping):
            raise _BadRow(f"expected a mapping, got {type(row).__name__}")
        images = _images(row, index, folder)
        if row.get("conversations") is not None:
            messages, length = _from_llava(row["conversations"], len(images))
        else:
            messages, length = _from_trl(row, len(images))
        _check_roles(messages)
    except _BadRow as problem:
        return {"messages": [], "images": [], "row_index": index, "modality_length": 0, "problem": str(problem)}
    length = max(length, 1)
    return {
        "messages": messages,
        "images": images,
        "row_index": index,
        "modality_length": length if images else -length,
        "problem": None,
    }


def _images(row: Mapping[str, Any], index: int, folder: str | None) -> list[Any]:
    images = row.get("image") if row.get("image") is not None else row.get("images")
    if images is None:
        return []
    images = list(images) if isinstance(images, list | tuple) else [images]
    return [_image(image, index, folder) for image in images]


def _image(image: Any, index: int, folder: str | None) -> Any:
    if image == "":
        raise _BadRow("an empty image path")
    if isinstance(image, str):
        if folder is None:
            raise ValueError(f"Row {index} names the image file {image!r}: give the image_folder it lies in.")
        path = os.path.normpath(os.path.join(folder, image))
        if os.path.commonpath([folder, path]) != folder:
            raise ValueError(f"Row {index}: the image path {image!r} leads out of the image folder {folder!r}.")
        return {"bytes": None, "path": path}
    if isinstance(image, Mapping):
        if image.get("bytes") is not None:
            # The path would be a mere name here, but datasets prefers a file of that name to the bytes.
            return {"bytes": image["bytes"], "path": None}
        if image.get("path"):
            return {"bytes": None, "path": image["path"]}
        raise _BadRow("an image with neither bytes nor path")
    if isinstance(image, PILImage.Image):
        return image
    raise _BadRow(f"an image of type {type(image).__name__}, expected a path, a picture or a mapping")


def _turn(role: str, text: str, num_images: int) -> dict[str, Any]:
    """One message, its images in front of its text (LLaVA's multimodal step)."""
    content: list[dict[str, str | None]] = [{"type": "image", "text": None} for _ in range(num_images)]
    if num_images:
        text = text.replace(IMAGE_TOKEN, "").strip()
    if text or not content:
        content.append({"type": "text", "text": text})
    return {"role": role, "content": content}


def _placeholders(counts: list[int], num_images: int) -> list[int]:
    """How many images each turn shows: its placeholders, or one where that alone fits (the authors' rule)."""
    if sum(counts) == num_images:
        return counts
    single = [min(count, 1) for count in counts]
    if sum(single) == num_images:
        return single
    raise _BadRow(f"{sum(counts)} image placeholders for {num_images} images")


def _from_llava(conversations: Any, num_images: int) -> tuple[list[dict[str, Any]], int]:
    if not isinstance(conversations, list | tuple) or not conversations:
        raise _BadRow("'conversations' is not a list of turns")
    for turn in conversations:
        if not isinstance(turn, Mapping) or turn.get("from") is None or not isinstance(turn.get("value"), str):
            raise _BadRow("a turn without 'from' or without a text in 'value'")
        if turn["from"] not in ROLES:
            raise _BadRow(f"unknown 'from' {turn['from']!r}, expected one of {sorted(ROLES)}")
    # Counted before anything is dropped, as the authors' sampler does.
    length = sum(len(turn["value"].split()) for turn in conversations)
    turns = conversations[1:] if conversations[0]["from"] == "gpt" else conversations
    shown = _placeholders([turn["value"].count(IMAGE_TOKEN) for turn in turns], num_images)
    return [_turn(ROLES[turn["from"]], turn["value"], n) for turn, n in zip(turns, shown, strict=True)], length


def _from_trl(row: Mapping[str, Any], num_images: int) -> tuple[list[dict[str, Any]], int]:
    if row.get("messages") is not None:
        messages = row["messages"]
    elif row.get("prompt") is not None and row.get("completion") is not None:
        prompt, completion = row["prompt"], row["completion"]
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        completion = (
            [{"role": "assistant", "content": completion}] if isinstance(completion, str) else list(completion)
        )
        if any(isinstance(message, Mapping) and message.get("role") == "assistant" for message in prompt):
            raise _BadRow("answers inside 'prompt', which would be trained on: give such rows as 'messages'")
        messages = [*prompt, *completion]
    else:
        raise _BadRow("neither 'conversations' nor 'messages' nor 'prompt' and 'completion'")
    if not isinstance(messages, list | tuple) or not messages:
        raise _BadRow("'messages' is not a list of messages")
    parsed = [_parse_message(message) for message in messages]
    length = sum(len(text.split()) for _, text, _ in parsed)
    if parsed[0][0] == "assistant":
        parsed = parsed[1:]
    counts = [count for _, _, count in parsed]
    if num_images and not any(counts):
        # TRL's rule for messages of plain strings: the images belong to the first question.
        first_user = next((number for number, (role, _, _) in enumerate(parsed) if role == "user"), None)
        counts = [num_images if number == first_user else 0 for number in range(len(parsed))]
    shown = _placeholders(counts, num_images)
    return [_turn(role, text, n) for (role, text, _), n in zip(parsed, shown, strict=True)], length


def _parse_message(message: Any) -> tuple[str, str, int]:
    """Role, text and number of image placeholders of one TRL message."""
    if not isinstance(message, Mapping) or message.get("role") not in ROLES.values():
        raise _BadRow(f"a message without a role among {sorted(ROLES.values())}")
    content = message.get("content")
    if isinstance(content, str):
        return message["role"], content, content.count(IMAGE_TOKEN)
    if not isinstance(content, list | tuple):
        raise _BadRow("a message whose content is neither text nor a list of parts")
    text, count = "", 0
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "image" and not any(part.get(key) is not None for key in ("image", "url", "path", "base64")):
            count += 1
        elif kind == "text" and isinstance(part.get("text"), str):
            text += part["text"]
            count += part["text"].count(IMAGE_TOKEN)
        else:
            raise _BadRow("a content part that is neither {'type': 'image'} nor a text; pictures belong in 'images'")
    return message["role"], text, count


def _check_roles(messages: list[dict[str, Any]]) -> None:
    """Questions and answers take turns, the last word is an answer, a system message comes first or not at all."""
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles and roles[0] == "system" else roles
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        raise _BadRow(f"wrong order of roles {roles}: questions and answers take turns, and an answer is last")


def decode_image(image: Any, row_index: int) -> PILImage.Image:
    """Open one image of a row as RGB.

    Args:
        image: a PIL image, a path, or a mapping with `bytes` or `path`.
        row_index: index for the error message.

    Returns:
        PIL image of mode RGB, fully loaded.

    Raises:
        ValueError: if it cannot be opened and decoded; the message names the row.
    """
    try:
        if isinstance(image, Mapping):
            image = io.BytesIO(image["bytes"]) if image.get("bytes") is not None else image["path"]
        if not isinstance(image, PILImage.Image):
            with PILImage.open(image) as opened:
                return opened.convert("RGB")
        return image.convert("RGB")
    except Exception as error:
        raise ValueError(f"Row {row_index}: an image cannot be decoded ({error!r}).") from error
