"""
Answer a file of questions, in LLaVA's format:

    python -m modeling_movekd.predict CHECKPOINT QUESTIONS.jsonl ANSWERS.jsonl --image-folder images

A question is a line {"question_id": 1, "image": "1.jpg", "text": "What is this?"}. `image` may also be a list or
missing. An answer is a line {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}.
An interrupted run continues from ANSWERS.jsonl.part when it is started again with the same checkpoint and settings.
Questions that cannot be asked are skipped and listed in ANSWERS.jsonl.bad_rows.jsonl.
"""

import argparse
import json
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .options import add_loading_arguments, add_sampling_arguments, sampling, source


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m modeling_movekd.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=source, help="Hub id or folder")
    parser.add_argument("questions", type=Path)
    parser.add_argument("answers", type=Path)
    parser.add_argument("--image-folder", type=Path, default=Path("."))
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--num-beams", type=int, default=1)
    parser.add_argument("--prompt-suffix", default="", help="text after each question")
    parser.add_argument("--max-bad-share", type=float, default=0.01, help="share of the questions that may be bad")
    add_sampling_arguments(parser)
    add_loading_arguments(parser)
    options = parser.parse_args(arguments)
    if options.batch_size < 1:
        parser.error(f"--batch-size is {options.batch_size}, expected a positive number")
    return options


# Before the imports below, which take seconds
if __name__ == "__main__":
    parse_arguments()

import torch
from huggingface_hub import ResolvedRevision
from PIL import Image
from tqdm import tqdm
from transformers import ProcessorMixin, set_seed
from transformers.utils import resolve_revision

from .chat_templates import IMAGE_TOKEN
from .files import save_text
from .images import decode_image, path_in_folder
from .inference import answer_batch, check_length, load_checkpoint, user_message
from .modeling_movekd import MoveKDForConditionalGeneration
from .predict_answers import Answers
from .prompts import prepare


@dataclass
class Question:
    """A question of the file. `line` counts from 1."""

    line: int
    question_id: Any
    text: str
    images: list[str]

    @property
    def key(self) -> str:
        """The key of the answer on disk."""
        return json.dumps([self.question_id, self.text, self.images])


def read_questions(path: Path) -> tuple[list[Question], dict[int, str]]:
    """Read a file of questions, and return them and the reason for each bad line, by its number from 1."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file.")
    questions: list[Question] = []
    bad: dict[int, str] = {}
    seen: dict[str, int] = {}
    # `splitlines` would also split at characters that JSON strings may contain, such as U+2028.
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            question = parse_question(number, line)
            key = json.dumps(question.question_id)
            if key in seen:
                raise ValueError(f"question_id {key} is that of line {seen[key]} already")
            seen[key] = number
            questions.append(question)
        except ValueError as error:
            bad[number] = str(error)
    return questions, bad


def parse_question(number: int, line: bytes) -> Question:
    try:
        row = json.loads(line.decode("utf-8-sig"))
        json.dumps(row, ensure_ascii=False).encode()  # tokenizers fail on lone surrogates, which JSON may escape
    except (json.JSONDecodeError, UnicodeError, RecursionError) as error:
        raise ValueError(f"no JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got a {type(row).__name__}")
    if not isinstance(row.get("question_id"), int | str):
        raise ValueError(f"`question_id` must be a number or a string, got {row.get('question_id')!r}")
    if not isinstance(row.get("text"), str) or not row["text"].strip():
        raise ValueError(f"`text` must be a question, got {row.get('text')!r}")
    images = row.get("image") or []
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise ValueError(f"`image` must be a file name or a list of file names, got {row['image']!r}")
    text = row["text"]
    if len(images) < 2 or text.count(IMAGE_TOKEN) != len(images):  # several keep their places
        text = text.replace(IMAGE_TOKEN, "")
    return Question(number, row["question_id"], text.strip(), images)


def load_image(folder: Path, name: str) -> Image.Image:
    return decode_image(path_in_folder(folder, name))


def identify(checkpoint: str, revision: str | None = None) -> str:
    """Identify the weights of a checkpoint: by the commit on the Hub, or by the folder and the time of its weights."""
    if not (folder := Path(checkpoint)).is_dir():
        return f"{checkpoint}@{revision.resolved if isinstance(revision, ResolvedRevision) else revision}"
    saved = max((path.stat().st_mtime_ns for path in folder.glob("model*.safetensors")), default=0)
    return f"{folder.resolve()}@{saved}"


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    save_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), path)


class BadQuestions:
    """Questions that cannot be asked, listed in a file. At most `max_share` of the `total` questions may be bad."""

    def __init__(self, path: Path, total: int, max_share: float) -> None:
        self.path, self.total, self.max_share = path, total, max_share
        self.reasons: dict[int, str] = {}
        path.unlink(missing_ok=True)

    def add(self, reasons: dict[int, str]) -> None:
        """Add the reasons for bad lines by their number, and refuse too many."""
        self.reasons.update(reasons)
        if self.reasons:
            rows = [{"line": line, "reason": reason} for line, reason in sorted(self.reasons.items())]
            write_lines(self.path, rows)
        if len(self.reasons) > self.max_share * self.total:
            first = "; ".join(f"line {line}: {reason}" for line, reason in sorted(self.reasons.items())[:3])
            raise ValueError(
                f"{len(self.reasons)} of {self.total} questions cannot be asked "
                f"({len(self.reasons) / self.total:.1%}; {self.max_share:.1%} may be). {first}. All are listed in "
                f"{self.path}: repair them or raise --max-bad-share."
            )


def prepare_questions(
    model: MoveKDForConditionalGeneration,
    processor: ProcessorMixin,
    questions: Sequence[Question],
    image_folder: Path,
    new_tokens: int,
) -> tuple[list[Question], dict[str, torch.Tensor], dict[int, str]]:
    """Return the questions that can be asked, their model inputs, and for each other question the reason by line."""
    batch: list[Question] = []
    conversations: list[list[dict[str, Any]]] = []
    bad: dict[int, str] = {}
    for question in questions:
        try:
            images = [load_image(image_folder, name) for name in question.images]
        except ValueError as error:
            bad[question.line] = str(error)
            continue
        batch.append(question)
        conversations.append([user_message(question.text, images)])
    if not batch:
        return [], {}, bad
    inputs = prepare(processor, conversations, model.device)
    fitting = []
    for index, (tokens, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"], strict=True)):
        try:
            check_length(model, {"input_ids": tokens[mask.bool()][None]}, new_tokens)
            fitting.append(index)
        except ValueError as error:
            bad[batch[index].line] = str(error)
    if len(fitting) < len(batch):
        inputs = prepare(processor, [conversations[index] for index in fitting], model.device) if fitting else {}
    return [batch[index] for index in fitting], inputs, bad


def predict(
    model: MoveKDForConditionalGeneration,
    processor: ProcessorMixin,
    questions_path: Path,
    answers_path: Path,
    model_id: str,
    image_folder: Path,
    batch_size: int = 8,
    max_bad_share: float = 0.01,
    prompt_suffix: str = "",
    identity: str | None = None,
    **generation: Any,
) -> dict[int, str]:
    """
    Answer the questions of a file. The arguments are the command's options, besides:

    Args:
        model_id (`str`): Name of the model in the answers.
        identity (`str`, *optional*): Identifies the weights, see [`identify`]. Defaults to `model_id`.
        generation: Arguments of `generate`.

    Returns:
        The reason for each bad line, by its number from 1.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size}, expected a positive number.")
    questions, bad_lines = read_questions(questions_path)
    questions = [replace(question, text=question.text + prompt_suffix) for question in questions]
    partial = answers_path.with_name(f"{answers_path.name}.part")
    settings = {"model": identity or model_id, "dtype": model.dtype, "image_folder": image_folder.resolve()}
    answers = Answers(partial, json.dumps(settings | generation, default=str))
    bad_path = answers_path.with_name(f"{answers_path.name}.bad_rows.jsonl")
    bad = BadQuestions(bad_path, len(questions) + len(bad_lines), max_bad_share)
    bad.add(bad_lines)
    unanswered = [question for question in questions if answers.get(question.key) is None]
    with tqdm(total=len(questions), initial=len(questions) - len(unanswered)) as progress:
        for start in range(0, len(unanswered), batch_size):
            asked = unanswered[start : start + batch_size]
            new_tokens = generation.get("max_new_tokens", 0)
            batch, inputs, reasons = prepare_questions(model, processor, asked, image_folder, new_tokens)
            bad.add(reasons)
            texts = answer_batch(model, processor, inputs, **generation) if batch else []
            for question, text in zip(batch, texts, strict=True):
                answers.add(question.key, text)
            progress.update(len(asked))
    write_answers(answers_path, questions, answers, model_id)
    partial.unlink(missing_ok=True)
    return bad.reasons


def write_answers(path: Path, questions: Sequence[Question], answers: Answers, model_id: str) -> None:
    rows = [
        {
            "question_id": question.question_id,
            "prompt": question.text,
            "text": text,
            "answer_id": uuid.uuid4().hex,
            "model_id": model_id,
            "metadata": {},
        }
        for question in questions
        if (text := answers.get(question.key)) is not None
    ]
    write_lines(path, rows)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    set_seed(options.seed)
    try:
        # A branch is resolved to its commit, so that answers of an older commit are not mixed in.
        revision = resolve_revision(options.checkpoint, options.revision)
        model, processor = load_checkpoint(options.checkpoint, revision, options.device, options.dtype)
        bad = predict(
            model,
            processor,
            options.questions,
            options.answers,
            model_id=Path(options.checkpoint).name,
            image_folder=options.image_folder,
            batch_size=options.batch_size,
            max_bad_share=options.max_bad_share,
            prompt_suffix=options.prompt_suffix,
            identity=identify(options.checkpoint, revision),
            max_new_tokens=options.max_new_tokens,
            num_beams=options.num_beams,
            **sampling(options),
        )
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"Answers are in {options.answers}; {len(bad)} questions were skipped.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
