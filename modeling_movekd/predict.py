"""
Answer a file of questions, in LLaVA's form:

    python -m modeling_movekd.predict CHECKPOINT QUESTIONS.jsonl ANSWERS.jsonl --image-folder images

A question is a line {"question_id": 1, "image": "1.jpg", "text": "What is this?"}; `image` may be missing (text alone)
or a list. An answer is {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}. Started again after an
interruption it goes on where it stopped, from ANSWERS.jsonl.part, if that is of the same checkpoint and settings.
Questions that cannot be asked are skipped, counted and listed with their line in ANSWERS.jsonl.bad_rows.jsonl.
"""

import argparse
import json
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ResolvedRevision
from PIL import Image
from tqdm import tqdm
from transformers import ProcessorMixin, set_seed
from transformers.utils import resolve_revision

from .images import decode_image, path_in_folder
from .inference import add_arguments, check_length, load_checkpoint, prepare, sampling, user_message
from .modeling_movekd import MoveKDForConditionalGeneration
from .predict_answers import Answers


@dataclass
class Question:
    """A line of the file that can be asked; `line` counts from 1."""

    line: int
    question_id: Any
    text: str
    images: list[str]

    @property
    def key(self) -> str:
        """What its answer is noted under."""
        return json.dumps([self.question_id, self.text, self.images])


def read_questions(path: Path) -> tuple[list[Question], dict[int, str]]:
    """
    Returns:
        The questions, and for each bad line, counted from 1, what is wrong with it.

    Raises:
        ValueError: if there is no such file.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file.")
    questions: list[Question] = []
    bad: dict[int, str] = {}
    seen: dict[str, int] = {}
    # Not `splitlines`, which ends lines at characters that JSON may hold as they are, such as U+2028
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
    """
    Raises:
        ValueError: with the field that is missing or of a wrong type.
    """
    try:
        row = json.loads(line.decode("utf-8-sig"))
        json.dumps(row, ensure_ascii=False).encode()  # JSON may escape half a character, which no tokenizer takes
    except (json.JSONDecodeError, UnicodeError) as error:
        raise ValueError(f"no JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"a JSON object is needed, got a {type(row).__name__}")
    if not isinstance(row.get("question_id"), int | str):
        raise ValueError(f"`question_id` must be a number or a string, got {row.get('question_id')!r}")
    if not isinstance(row.get("text"), str) or not row["text"].strip():
        raise ValueError(f"`text` must be a question, got {row.get('text')!r}")
    images = row.get("image") or []
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise ValueError(f"`image` must be a file name or a list of them, got {row['image']!r}")
    return Question(number, row["question_id"], row["text"].replace("<image>", "").strip(), images)


def load_image(folder: Path, name: str) -> Image.Image:
    """
    Raises:
        ValueError: if the name leads out of the folder, or the image cannot be decoded.
    """
    return decode_image(path_in_folder(folder, name))


def identify(checkpoint: str, revision: str | None = None) -> str:
    """What tells a checkpoint from others: its commit on the Hub, or its folder and when its weights were saved."""
    if not (folder := Path(checkpoint)).is_dir():
        return f"{checkpoint}@{revision.resolved if isinstance(revision, ResolvedRevision) else revision}"
    saved = max((path.stat().st_mtime_ns for path in folder.glob("model*.safetensors")), default=0)
    return f"{folder.resolve()}@{saved}"


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """JSON lines, under a temporary name first."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    temporary.replace(path)


def prepare_fitting(
    model: MoveKDForConditionalGeneration,
    processor: ProcessorMixin,
    conversations: Sequence[Sequence[dict[str, Any]]],
    new_tokens: int,
) -> tuple[dict[str, torch.Tensor], dict[int, str]]:
    """A batch of those conversations that the language model has room for; of the others, by index, what they need."""
    inputs = prepare(processor, conversations, model.device)
    problems = {}
    for index, (tokens, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"], strict=True)):
        try:
            check_length(model, {"input_ids": tokens[mask.bool()][None]}, new_tokens)
        except ValueError as error:
            problems[index] = str(error)
    if problems:
        fitting = [conversation for index, conversation in enumerate(conversations) if index not in problems]
        inputs = prepare(processor, fitting, model.device) if fitting else {}
    return inputs, problems


@torch.inference_mode()
def answer_batch(
    model: MoveKDForConditionalGeneration,
    processor: ProcessorMixin,
    inputs: dict[str, torch.Tensor],
    **generation: Any,
) -> list[str]:
    """Answers to a batch of [`prepare`]'s."""
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    output = model.generate(**inputs, **generation)
    texts = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


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
    Answer the questions of a file; see the module.

    Args:
        max_bad_share: Largest share of the lines that may be bad, between 0 and 1.
        prompt_suffix: Text after each question, such as LLaVA's request for a single word.
        identity: What tells this model from others, see [`identify`]; by default `model_id`.
        generation: Arguments of `generate`.

    Returns:
        For each bad line, counted from 1, what is wrong with it.

    Raises:
        ValueError: if more lines are bad than may be (they are listed then too), if an interrupted run has left
            answers of another checkpoint or with other settings, or if the batch size is no positive number.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size}, expected a positive number.")
    questions, bad = read_questions(questions_path)
    questions = [replace(question, text=question.text + prompt_suffix) for question in questions]
    partial = answers_path.with_name(f"{answers_path.name}.part")
    bad_path = answers_path.with_name(f"{answers_path.name}.bad_rows.jsonl")
    total = len(questions) + len(bad)
    settings = {"model": identity or model_id, "dtype": model.dtype, "image_folder": image_folder.resolve()}
    answers = Answers(partial, json.dumps(settings | generation, default=str))

    def note(new: dict[int, str]) -> None:
        bad.update(new)
        if bad:
            write_lines(bad_path, [{"line": line, "reason": reason} for line, reason in sorted(bad.items())])
        if len(bad) > max_bad_share * total:
            first = "; ".join(f"line {line}: {reason}" for line, reason in sorted(bad.items())[:3])
            raise ValueError(
                f"{len(bad)} of {total} questions cannot be asked ({len(bad) / total:.1%}; {max_bad_share:.1%} may be)"
                f". {first}. All are listed in {bad_path}: repair them or raise --max-bad-share."
            )

    bad_path.unlink(missing_ok=True)
    note({})
    unanswered = [question for question in questions if answers.get(question.key) is None]
    with tqdm(total=len(questions), initial=len(questions) - len(unanswered)) as progress:
        for start in range(0, len(unanswered), batch_size):
            batch: list[Question] = []
            conversations: list[list[dict[str, Any]]] = []
            found: dict[int, str] = {}
            for question in unanswered[start : start + batch_size]:
                try:
                    images = [load_image(image_folder, name) for name in question.images]
                except ValueError as error:
                    found[question.line] = str(error)
                    continue
                batch.append(question)
                conversations.append([user_message(question.text, images)])
            if batch:
                new_tokens = generation.get("max_new_tokens", 0)
                inputs, problems = prepare_fitting(model, processor, conversations, new_tokens)
                found |= {batch[index].line: problem for index, problem in problems.items()}
                batch = [question for index, question in enumerate(batch) if index not in problems]
            note(found)
            texts = answer_batch(model, processor, inputs, **generation) if batch else []
            for question, answer in zip(batch, texts, strict=True):
                answers.add(question.key, answer)
            progress.update(len(batch) + len(found))
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
    write_lines(answers_path, rows)
    partial.unlink(missing_ok=True)
    return bad


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m modeling_movekd.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", help="Hub id or folder")
    parser.add_argument("questions", type=Path)
    parser.add_argument("answers", type=Path)
    parser.add_argument("--image-folder", type=Path, default=Path("."))
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--num-beams", type=int, default=1)
    parser.add_argument("--prompt-suffix", default="", help="text after each question")
    parser.add_argument("--max-bad-share", type=float, default=0.01, help="share of the questions that may be bad")
    add_arguments(parser)
    options = parser.parse_args(arguments)
    if options.batch_size < 1:
        parser.error(f"--batch-size is {options.batch_size}, expected a positive number")

    set_seed(options.seed)
    try:
        # One commit, whose answers are known as its own when a branch has moved on
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
