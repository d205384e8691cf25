"""Small local data with the columns of the eight benchmarks, and a model that always gives the same answer."""

from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    CLIPImageProcessor,
    CLIPVisionModel,
)

from modeling_movekd import MoveKDForConditionalGeneration, MoveKDVisionModel
from modeling_movekd.processing import build_processor
from tests.helpers.tiny import VOCABULARY, clip_config, llama_config, make_tokenizer


def picture(seed: int, size: tuple[int, int] = (24, 18)) -> Image.Image:
    pixels = torch.randint(256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.byte().numpy())


def vote(*answers: str) -> list[str]:
    """Ten people's answers: those given, then others that agree with none."""
    return [*answers, *(f"other {index}" for index in range(10 - len(answers)))]


def vqav2(row: int, answers: list[str]) -> dict[str, Any]:
    answered = [{"answer": text, "answer_confidence": "yes", "answer_id": i} for i, text in enumerate(answers, 1)]
    return {
        "question_type": "is the",
        "multiple_choice_answer": answers[0],
        "answers": answered,
        "image_id": row,
        "answer_type": "yes/no",
        "question_id": 10 * row,
        "question": "Is the dog red?",
        "image": picture(row),
    }


def textvqa(row: int, answers: list[str]) -> dict[str, Any]:
    return {
        "image_id": f"{row:04x}",
        "question_id": row,
        "question": "what does it say?",
        "question_tokens": ["what", "does", "it", "say"],
        "image": picture(row),
        "image_width": 24,
        "image_height": 18,
        "flickr_original_url": "",
        "flickr_300k_url": "",
        "answers": answers,
        "image_classes": ["Sign"],
        "set_name": "val",
        "ocr_tokens": ["STOP", "yes"],
    }


def gqa(row: int, answer: str) -> dict[str, Any]:
    return {
        "id": f"q{row}",
        "imageId": f"n{row}",
        "question": "Is it open?",
        "answer": answer,
        "fullAnswer": f"{answer}, it is.",
        "isBalanced": True,
        "semanticStr": "select: door",
    }


def science(row: int, answer: int, hint: str) -> dict[str, Any]:
    return {
        "image": picture(row),
        "question": "Which is larger?",
        "choices": ["mouse", "whale"],
        "answer": answer,
        "hint": hint,
        "task": "closed choice",
        "grade": "grade2",
        "subject": "natural science",
        "topic": "biology",
        "category": "Animals",
        "skill": "Compare",
        "lecture": "",
        "solution": "",
    }


def mmbench(row: int, answer: str, hint: str, choices: list[str | None]) -> dict[str, Any]:
    return {
        "index": row,
        "question": "What is seen?",
        "hint": hint,
        "answer": answer,
        **dict(zip("ABCD", choices, strict=True)),
        "category": "object_localization",
        "image": picture(row),
        "source": "made",
        "L2-category": "finegrained_perception",
        "comment": "nan",
        "split": "dev",
    }


def yes_no(row: int, answer: str, category: str, **kwargs: Any) -> dict[str, Any]:
    return {"question_id": f"{category}/{row // 2}", "image": picture(row), "answer": answer, "category": category} | (
        {"question": "Is there a cat? Please answer yes or no."} | kwargs
    )


# By the repository's name: subset, split, rows
DATA: dict[str, list[tuple[str, str, list[dict[str, Any]]]]] = {
    "VQAv2": [("default", "validation", [vqav2(1, vote(*["yes"] * 10)), vqav2(2, vote("yes", "yes", "no"))])],
    "GQA": [
        ("testdev_balanced_instructions", "testdev", [gqa(1, "yes"), gqa(2, "no"), gqa(3, "no")]),
        ("testdev_balanced_images", "testdev", [{"id": f"n{row}", "image": picture(row)} for row in (1, 2, 3)]),
    ],
    "textvqa": [("default", "validation", [textvqa(1, vote("no")), textvqa(2, vote(*["yes"] * 3))])],
    "VizWiz-VQA": [
        (
            "default",
            "val",
            [
                {"question_id": f"VizWiz_val_{row}", "image": picture(row), "question": "what is this"}
                | {"answers": vote(*answers), "category": "other"}
                for row, answers in enumerate([["yes"] * 4, ["unanswerable"] * 9])
            ],
        )
    ],
    "POPE": [
        (
            "default",
            "test",
            [
                yes_no(
                    row, answer, category, question="Is there a cat in the image?", id=str(row), image_source="made"
                )
                for row, (answer, category) in enumerate(
                    [("yes", "adversarial"), ("no", "popular"), ("no", "random"), ("yes", "random")]
                )
            ],
        )
    ],
    "ScienceQA": [("ScienceQA-IMG", "test", [science(1, 1, "Animals differ."), science(2, 0, ""), science(3, 1, "")])],
    "MME": [
        (
            "default",
            "test",
            [
                yes_no(row, "Yes" if row % 2 == 0 else "No", category)
                for row, category in enumerate(["existence"] * 2 + ["OCR"] * 2 + ["code_reasoning"] * 2)
            ],
        )
    ],
    "MMBench": [
        (
            "en",
            "dev",
            [
                mmbench(1, "B", "nan", ["one", "two", "nan", "nan"]),
                mmbench(2, "C", "Look.", ["x", "y", "z", "nan"]),
                mmbench(3, "B", "nan", ["p", "q", "r", "s"]),
                mmbench(4, "A", "nan", ["p", "q", "r", "s"]),
            ],
        )
    ],
}


def write_data(root: Path) -> Path:
    """
    Write the data so that, run in that folder, lmms-eval's own task files read it: the names of the repositories that
    they name are local folders of Parquet files.
    """
    for name, parts in DATA.items():
        folder = root / "lmms-lab-encoder" / name
        lines = ["---", "configs:"]
        for subset, split, rows in parts:
            (folder / subset).mkdir(parents=True)
            table = Dataset.from_dict({key: [row[key] for row in rows] for key in rows[0]})
            if "image" in rows[0]:
                table = table.cast_column("image", datasets.Image())
            table.to_parquet(folder / subset / f"{split}.parquet")
            lines += [f"- config_name: {subset}", "  data_files:", f"  - split: {split}"]
            lines += [f"    path: {subset}/{split}.parquet"]
        (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
    return root


@torch.no_grad()
def save_checkpoint(folder: Path, says: str | None = None, image_aspect_ratio: str = "pad", seed: int = 0) -> Path:
    """
    A tiny random model.

    Args:
        says: What it answers to everything; no letter in it may be there twice. By default whatever its weights say.
    """
    torch.manual_seed(seed)
    clip = CLIPVisionModel(clip_config(projection_dim=24))
    language = AutoModelForCausalLM.from_config(llama_config(hidden_size=64, max_position_embeddings=1200))
    for parameter in language.parameters():
        if parameter.dim() > 1:
            parameter.copy_(0.3 * torch.randn(parameter.shape))
    if says is not None:
        # Layers that add nothing, and a head that follows each token by the next one of the answer
        for layer in language.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        tokens = [VOCABULARY.index(letter) for letter in f":{says}"] + [2]
        embeddings = torch.nn.functional.normalize(language.model.embed_tokens.weight, dim=-1)
        language.lm_head.weight.zero_()
        for token, following in zip(tokens, tokens[1:], strict=False):
            language.lm_head.weight[following] = embeddings[token]
    tower = MoveKDVisionModel.from_clip(clip, lora_rank=4, expert_init="kaiming")
    model = MoveKDForConditionalGeneration.from_parts(tower, language, image_aspect_ratio=image_aspect_ratio)
    for parameter in model.model.multi_modal_projector.parameters():
        parameter.copy_(0.2 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    build_processor(model.config, CLIPImageProcessor(), make_tokenizer()).save_pretrained(folder)
    return folder
