"""The demo: a student learns in two stages to answer questions about generated scenes, on the CPU of a laptop."""

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedModel, ProcessorMixin
from trl import TrlParser

from hub.card_facts import code_revision, weights_fingerprint
from hub.card_write import write_card
from modeling_movekd import MoveKDForConditionalGeneration
from modeling_movekd.files import EVALUATION_NAME, new_file, save_json
from modeling_movekd.inference import answer_batch
from modeling_movekd.prompts import prepare
from train.arguments import DataArguments, ModelArguments
from train.build import build_student
from train.config import MoveKDSFTConfig
from train.demo.scenes import FAMILIES, chance_levels, scenes
from train.distributed import whole_weights
from train.run import train


RECIPES = ("train/recipes/demo_pretrain.yaml", "train/recipes/demo_finetune.yaml")
SIZES = {"pretrain": 2000, "finetune": 2000, "test": 500}
OUTPUT = Path("outputs/demo")
NEW_TOKENS = 8  # more than any answer has


def parse_recipe(path: str) -> tuple[DataArguments, MoveKDSFTConfig, ModelArguments]:
    """The arguments of a recipe, as `train/sft.py --config` reads them."""
    return TrlParser((DataArguments, MoveKDSFTConfig, ModelArguments)).parse_args_and_config(["--config", path])


@torch.no_grad()
def answer_questions(
    model: PreTrainedModel, processor: ProcessorMixin, rows: Dataset, batch_size: int = 50
) -> list[str]:
    """Greedy answers to the question of each row (`image`, `conversations`)."""
    answers: list[str] = []
    model.eval()
    for start in tqdm(range(0, len(rows), batch_size), desc="answers", leave=False):
        batch = rows[start : start + batch_size]
        messages = [
            [
                {
                    "role": "user",
                    "content": [{"type": "image", "image": image}, {"type": "text", "text": question(turns)}],
                }
            ]
            for image, turns in zip(batch["image"], batch["conversations"], strict=True)
        ]
        inputs = prepare(processor, messages, model.device)
        answers += answer_batch(model, processor, inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    return answers


def question(turns: Sequence[dict[str, str]]) -> str:
    """The question of a LLaVA conversation of one round, without the image placeholder."""
    return turns[0]["value"].replace("<image>", "").strip()


def accuracy_by_family(answers: Sequence[str], rows: Dataset, families: Sequence[str] = FAMILIES) -> dict[str, float]:
    """Share of exact answers in each family of questions."""
    right: dict[str, list[bool]] = {family: [] for family in families}
    for answer, turns, family in zip(answers, rows["conversations"], rows["family"], strict=True):
        right[family].append(answer == turns[1]["value"])
    return {family: sum(values) / len(values) for family, values in right.items()}


def evaluation(accuracies: dict[str, float], rows: Dataset, folder: Path) -> dict[str, Any]:
    """The accuracies in the form of a checkpoint's evaluation file, for its model card."""
    common = {
        "task": "image-text-to-text",
        "dataset": "generated-scenes",
        "split": "test",
        "metric": "exact_match",
        "prompt": f"the question alone, in the checkpoint's chat template; greedy, at most {NEW_TOKENS} tokens",
        "code": code_revision(),  # which also generates the data
    }
    counts = {family: rows["family"].count(family) for family in accuracies}
    results = [
        common | {"subset": family, "value": value, "rows": counts[family]} for family, value in accuracies.items()
    ]
    return {"weights": weights_fingerprint(folder), "results": results}


def draw_answers(path: Path, rows: Dataset, answers: Sequence[str], columns: int = 5, count: int = 15) -> None:
    """A grid of pictures with question, answer and truth."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * columns, 3.9 * count // columns), layout="constrained")
    for axis, row, answer in zip(figure.subplots(count // columns, columns).flat, rows, answers, strict=False):
        truth = row["conversations"][1]["value"]
        axis.imshow(row["image"])
        axis.set_axis_off()
        axis.set_title(
            f"{question(row['conversations'])}\nanswer: {answer}   truth: {truth}",
            fontsize=9,
            color="tab:green" if answer == truth else "tab:red",
        )
    save_figure(figure, path)


def draw_losses(path: Path, histories: dict[str, list[dict[str, Any]]]) -> None:
    """The losses over the steps, a column for each stage."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(histories), 8), layout="constrained")
    axes = figure.subplots(3, len(histories), squeeze=False)
    for column, (stage, history) in enumerate(histories.items()):
        steps = [entry for entry in history if "text" in entry]
        names = [["text"], [name for name in steps[0] if name.startswith("kd/")], ["balance"]]
        for axis, group in zip(axes[:, column], names, strict=True):
            for name in group:
                axis.plot([entry["step"] for entry in steps], [entry[name] for entry in steps], label=name)
            axis.set_xlabel("step")
            axis.legend()
        axes[0, column].set_title(stage)
    save_figure(figure, path)


def save_figure(figure: Any, path: Path) -> None:
    with new_file(path) as temporary:
        figure.savefig(temporary, dpi=80)


def run_demo(rebuild_towers: bool = False) -> dict[str, dict[str, float]]:
    """
    Train both stages, then ask the student about unseen pictures.

    Args:
        rebuild_towers (`bool`, defaults to `False`): Train the student's CLIP, the teachers and the language model
            anew, instead of using those in `train/demo/weights`.

    Returns:
        Accuracy by family of the trained and the untrained student, and of the best constant answer (`chance`).
    """
    if not all(Path(recipe).is_file() for recipe in RECIPES):
        raise ValueError(f"{RECIPES[0]} is not in {Path.cwd()}. Run the demo in the root folder of the clone.")
    started, state = time.perf_counter(), PartialState()
    if rebuild_towers:
        from train.demo.networks import build_towers

        with state.main_process_first():
            if state.is_main_process:
                build_towers("train/demo/weights")
    with state.main_process_first():
        for split in ("pretrain", "finetune"):
            folder = OUTPUT / "data" / split
            if state.is_main_process:
                scenes(split, SIZES[split]).save_to_disk(folder)

    histories: dict[str, list[dict[str, Any]]] = {}
    trainer = None
    for recipe in RECIPES:
        data_args, args, model_args = parse_recipe(recipe)
        trainer = train(data_args, args, model_args, recipe)
        histories[args.stage] = trainer.state.log_history
        trainer.end() if recipe != RECIPES[-1] else None
    state.wait_for_everyone()
    results: dict[str, dict[str, float]] = {}
    if state.is_main_process:
        rows = scenes("test", SIZES["test"])
        _, args, model_args = parse_recipe(RECIPES[0])
        with whole_weights(args):
            untrained, processor = build_student(args, model_args)
            model = MoveKDForConditionalGeneration.from_pretrained(OUTPUT)
            answers = answer_questions(model, processor, rows)
            results = {
                "trained": accuracy_by_family(answers, rows),
                "untrained": accuracy_by_family(answer_questions(untrained, processor, rows), rows),
                "chance": chance_levels(),
            }
        draw_answers(OUTPUT / "answers.png", rows, answers)
        (OUTPUT / "assets").mkdir(exist_ok=True)
        shutil.copyfile(OUTPUT / "answers.png", OUTPUT / "assets" / "answers.png")  # for the card
        draw_losses(OUTPUT / "losses.png", histories)
        save_json(results | {"seconds": time.perf_counter() - started}, OUTPUT / "results.json")
        save_json(evaluation(results["trained"], rows, OUTPUT), OUTPUT / EVALUATION_NAME)
        write_card(OUTPUT)
        print(results_table(results))
        print(f"Pictures: {OUTPUT}/answers.png, {OUTPUT}/losses.png. The student loads anywhere with\n")
        print("    from transformers import AutoModel, AutoProcessor")
        loaded = f"from_pretrained({json.dumps(str(OUTPUT))}, trust_remote_code=True)"
        print(f"    model = AutoModel.{loaded}\n    processor = AutoProcessor.{loaded}\n")
    return results


def results_table(results: dict[str, dict[str, float]]) -> str:
    """Accuracies in percent as a Markdown table, a row for each family."""
    lines = ["| family | " + " | ".join(results) + " |", "|---" * (len(results) + 1) + "|"]
    lines += [
        f"| {family} | " + " | ".join(f"{100 * column[family]:.1f}" for column in results.values()) + " |"
        for family in FAMILIES
    ]
    return "\n".join(lines)
