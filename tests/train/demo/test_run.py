"""The demo as its users run it, and its parts."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import ProcessorMixin

from hub.card_facts import read_evaluation
from modeling_movekd import MoveKDForConditionalGeneration
from train.build import build_student
from train.demo.run import (
    RECIPES,
    accuracy_by_family,
    draw_answers,
    draw_losses,
    evaluation,
    parse_recipe,
    question,
    results_table,
    run_demo,
)
from train.demo.scene_labels import cell_labels, normalized, probe_scores, resized
from train.demo.scenes import FAMILIES, sample_scene, scene_image, scenes
from train.demo.text_scenes import TextScenes
from train.teachers.preprocessing import CLIP_MEAN, CLIP_STD


ROOT = Path(__file__).parents[3]


def test_recipes_are_two_stages_of_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (_, first, _), (_, second, model_args) = (parse_recipe(recipe) for recipe in RECIPES)
    assert (first.stage, second.stage) == ("pretrain", "finetune")
    assert model_args.model_name_or_path == first.output_dir
    assert first.distillation_preset == second.distillation_preset == "student_heads"
    assert first.teachers == second.teachers


@pytest.fixture(scope="module")
def untrained() -> tuple[MoveKDForConditionalGeneration, ProcessorMixin]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        _, args, model_args = parse_recipe(RECIPES[0])
        return build_student(args, model_args)


@pytest.fixture(scope="module")
def tokens(untrained) -> torch.Tensor:
    """What the projector gets before training, `(400, 16, 128)`."""
    pictures = resized([scene_image("test", index) for index in range(400)], 64)
    with torch.no_grad():
        tower = untrained[0].model.vision_tower.eval()
        return tower(normalized(pictures, CLIP_MEAN, CLIP_STD)).last_hidden_state[:, 1:]


def test_tokens_of_objects_know_their_place(tokens: torch.Tensor) -> None:
    """Relations ask for it, and contrast alone had made the small CLIP forget it."""
    is_object = cell_labels([sample_scene("test", index) for index in range(400)]).color > 0
    place = torch.arange(16).expand(400, 16).masked_fill(~is_object, -1)
    assert probe_scores(tokens, {"place": place}, trained=280)["place"] > 0.95


def test_the_projector_begins_at_the_scale_of_words(untrained, tokens: torch.Tensor) -> None:
    """Image tokens much larger than those that the language model has learnt from drown what it has learnt."""
    model, processor = untrained
    told = TextScenes([sample_scene("test", index) for index in range(50)], processor.tokenizer)
    embedding = model.get_input_embeddings()
    cells = (embedding(told.words.clamp(min=0)) * (told.words >= 0).unsqueeze(-1)).sum(2)
    projected = model.model.multi_modal_projector(tokens)
    assert 1 / 3 < projected.square().mean().sqrt() / cells.square().mean().sqrt() < 3


def test_no_word_of_a_question_is_unknown(untrained) -> None:
    _, processor = untrained
    for row in scenes("test", 10):
        asked = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question(row["conversations"])}]}
        ]
        text = processor.apply_chat_template(asked, add_generation_prompt=True)
        ids = processor(text=text, images=row["image"])["input_ids"]
        assert processor.tokenizer.unk_token_id not in ids[0]


def test_outside_the_clone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="folder of the clone"):
        run_demo()


def test_accuracy_and_pictures(tmp_path: Path) -> None:
    rows = scenes("test", 15)
    truth = [turns[1]["value"] for turns in rows["conversations"]]
    assert accuracy_by_family(truth, rows) == dict.fromkeys(FAMILIES, 1.0)
    wrong = [
        "no such answer" if family == "read" else answer for answer, family in zip(truth, rows["family"], strict=True)
    ]
    assert accuracy_by_family(wrong, rows) == dict.fromkeys(FAMILIES, 1.0) | {"read": 0.0}
    assert "| read | 0.0 |" in results_table({"trained": accuracy_by_family(wrong, rows)})

    draw_answers(tmp_path / "answers.png", rows, wrong)
    history = [{"step": step, "text": 1.0, "kd/clip": 0.5, "balance": 1.0} for step in (1, 2)]
    draw_losses(tmp_path / "losses.png", {"pretrain": history, "finetune": history})
    for name in ("answers.png", "losses.png"):
        colors = Image.open(tmp_path / name).convert("RGB").getcolors(maxcolors=1 << 24)
        assert len(colors) > 100, f"{name} is all but empty"
    assert not list(tmp_path.glob("*.tmp*"))


def test_accuracies_as_the_card_takes_them(tmp_path: Path) -> None:
    rows = scenes("test", 15)
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    written = evaluation(dict.fromkeys(FAMILIES, 0.5), rows, tmp_path)
    (tmp_path / "evaluation.json").write_text(json.dumps(written))
    results = read_evaluation(tmp_path)
    assert [(result.subset, result.value) for result in results] == [(family, 0.5) for family in FAMILIES]
    assert sum(result.rows for result in results) == 15
    (tmp_path / "model.safetensors").write_bytes(b"others!")
    with pytest.raises(ValueError, match="is of the weights"):
        read_evaluation(tmp_path)


@pytest.mark.slow
def test_whole_demo(tmp_path: Path) -> None:
    for room in ("modeling_movekd", "train", "hub"):
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "accelerate.commands.launch", "train/sft.py"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=1800, env=os.environ | {"PYTHONPATH": ""}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    output = tmp_path / "outputs" / "demo"
    results = json.loads((output / "results.json").read_text())
    assert results_table({name: results[name] for name in ("trained", "untrained", "chance")}) in done.stdout
    for family in ("attribute", "presence", "count", "read"):  # what the README says is learned
        assert results["trained"][family] > results["chance"][family] + 0.25, results
        assert results["trained"][family] > results["untrained"][family] + 0.25, results
    card = ModelCard.load(output / "README.md")
    measured = {result.dataset_config: result.metric_value for result in card.data.eval_results}
    assert measured == results["trained"] and "### Stage 2: `finetune`" in card.text
    assert "(assets/answers.png)" in card.text and (output / "assets" / "answers.png").is_file()
    assert {"answers.png", "losses.png", "model.safetensors", "distiller.safetensors"} <= {
        path.name for path in output.iterdir()
    }

    said = done.stdout.split("loads anywhere with")[1].splitlines()
    load = [line.strip() for line in said if line.startswith("    ")]
    load = ["import sys; sys.path = [path for path in sys.path if path]", *load]
    load.append("print(type(model).__name__, type(processor).__name__)")
    bare = subprocess.run(
        [sys.executable, "-I", "-c", "\n".join(load)],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,  # no question may be asked there
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "MoveKDForConditionalGeneration LlavaProcessor" in bare.stdout, bare.stderr
    assert "[y/N]" not in bare.stdout + bare.stderr
