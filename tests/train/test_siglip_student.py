"""A student of SigLIP 2 and a language model like Qwen3: both stages, and what comes out of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM, SiglipImageProcessor, SiglipVisionModel

from modeling_movekd import predict
from modeling_movekd.inference import Conversation, load_checkpoint
from tests.helpers.tiny import siglip_config
from tests.train.conftest import TOKENIZER
from train import run as stage_run
from train.build import build_distiller, build_student, build_teachers
from train.plan.models import build_planned_run


@pytest.fixture(scope="session")
def siglip_parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """4 x 4 patches of 32 channels, as the CLIP of `parts` has."""
    folder = tmp_path_factory.mktemp("siglip")
    torch.manual_seed(0)
    SiglipVisionModel(siglip_config()).save_pretrained(folder / "vision")
    SiglipImageProcessor(size={"height": 17, "width": 17}, resample=2).save_pretrained(folder / "vision")
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.save_pretrained(folder / "language")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512}
    Qwen3ForCausalLM(Qwen3Config(**sizes | heads, vocab_size=len(tokenizer))).save_pretrained(folder / "language")
    return {"vision_model": str(folder / "vision"), "language_model": str(folder / "language")}


def test_both_stages_and_answers(arguments, siglip_parts, tmp_path: Path, capsys) -> None:
    options: dict[str, Any] = {"distillation_preset": "student_heads", "token_weighting": "cls_attention"}
    pictures = {"visualize_steps": 2, "visualize_images": 2}
    first = stage_run.train(*arguments(stage="pretrain", max_steps=2, **siglip_parts, **options, **pictures))
    losses = [entry for entry in first.state.log_history if "kd" in entry]
    assert len(losses) == 2 and all(entry["kd"] > 0 and entry["balance"] > 0 for entry in losses)
    stems = {path.stem for path in (tmp_path / "output" / "pictures" / "step-2").rglob("*.png")}
    assert any("experts" in stem for stem in stems) and not any("cls-attention" in stem for stem in stems)
    facts = json.loads((tmp_path / "output" / "training_facts.json").read_text())
    assert facts["vision_fingerprint"] and facts["base_models"][0]["model"] == "vision"
    second = stage_run.train(
        *arguments(
            stage="finetune",
            max_steps=2,
            model_name_or_path=str(tmp_path / "output"),
            output_dir=str(tmp_path / "second"),
            **options,
        )
    )
    assert second.model.config.vision_feature_select_strategy == "full"
    model, processor = load_checkpoint(tmp_path / "second")
    assert processor.image_processor.resample == 2 and processor.image_processor.image_mean[0] == 0.5
    Image.new("RGB", (40, 20), (200, 30, 30)).save(tmp_path / "red.png")
    answer = Conversation(model, processor, max_new_tokens=4).ask("Color?", [Image.open(tmp_path / "red.png")])
    rows = tmp_path / "questions.jsonl"
    rows.write_text(json.dumps({"question_id": 1, "image": "red.png", "text": "Color?"}) + "\n")
    arguments_of_predict = [tmp_path / "second", rows, tmp_path / "answers.jsonl", "--image-folder", tmp_path]
    assert predict.main([*map(str, arguments_of_predict), "--max-new-tokens", "4"]) == 0, capsys.readouterr().err
    assert json.loads((tmp_path / "answers.jsonl").read_text())["text"].strip() == answer.strip()


def test_planned(arguments, siglip_parts) -> None:
    _, args, model_args = arguments(distillation_preset="student_heads", **siglip_parts)
    assert not build_planned_run(args, model_args).model.config.vision_config.class_token


def test_adapters_beside_a_clip_that_the_student_is_not(arguments, parts, siglip_parts) -> None:
    _, args, model_args = arguments(distillation_preset="paper", **siglip_parts)
    student, _ = build_student(args, model_args)
    with pytest.raises(ValueError, match="started from SigLIP and not from the teacher 'clip'.*student_heads"):
        build_distiller(args, student, build_teachers(args))
    others: dict[str, Any] = {"token_weighting": "none", "teacher_weighting": "equal"}
    others["teachers"] = [{"name": "vit", "model": parts["vit"]}]
    _, args, model_args = arguments(distillation_preset="paper", **siglip_parts, **others)
    assert set(build_distiller(args, student, build_teachers(args))) == {"vit"}


def test_the_teacher_clip_is_a_clip(arguments, siglip_parts) -> None:
    teachers = [{"name": "clip", "model": siglip_parts["vision_model"]}]
    _, args, _ = arguments(**siglip_parts, teachers=teachers, distillation_preset="student_heads")
    with pytest.raises(ValueError, match="'siglip_vision_model', but the teacher of this name must be a CLIP"):
        build_teachers(args)


def test_layers_that_cannot_be_kept(arguments, siglip_parts) -> None:
    _, args, model_args = arguments(distillation_preset="student_heads", cut_tower=False, **siglip_parts)
    with pytest.raises(ValueError, match="SigLIP's pooling head.*`cut_tower: true`"):
        build_student(args, model_args)
