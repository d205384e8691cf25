"""Stage `encoder`: distillation into a vision tower without a language model, and what later stages make of it."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel

from hub.card_write import check_card, write_card
from modeling_movekd.vision_movekd import MoveKDVisionModel
from tests.helpers.bare_process import load_as_stranger
from tests.helpers.colored_rows import llava_rows
from tests.helpers.launched import ROOT, launch
from tests.helpers.trainers import SMALL_RUN
from train import run as stage_run
from train.arguments import DataArguments, ModelArguments
from train.build import build_distiller, build_image_collator, build_student, build_teachers
from train.build_encoder import build_encoder, heads_to_continue
from train.config import MoveKDSFTConfig
from train.data.bad_rows import BadRows
from train.data.datasets import load_train_and_validation


SETTINGS = SMALL_RUN | {"stage": "encoder", "lora_dropout": 0.0, "learning_rate": 1e-3, "save_strategy": "no"}
RUN = {
    **{"max_steps": 4, "gradient_accumulation_steps": 2, "train_sampling_strategy": "sequential"},
    **{"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 4, "visualize_steps": 4},
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 48 images, one of them broken."""
    folder = tmp_path_factory.mktemp("pictures")
    for index, row in enumerate(llava_rows(48)):
        row["image"].save(folder / f"{index:02d}.png")
    (folder / "00.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def teachers(parts: dict[str, str]) -> list[dict[str, str]]:
    return [{"name": "clip", "model": parts["clip"]}, {"name": "vit", "model": parts["vit"]}]


@pytest.fixture(scope="module")
def data(images: Path) -> DataArguments:
    return DataArguments(dataset_name=[str(images)], validation_share=0.25, max_bad_row_share=0.05)


@pytest.fixture(scope="module")
def trained(parts, teachers, data: DataArguments, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The trainer after four steps on the folder."""
    output = str(tmp_path_factory.mktemp("encoder") / "out")
    args = MoveKDSFTConfig(**SETTINGS | RUN, vision_model=parts["clip"], teachers=teachers, output_dir=output)
    return stage_run.train(data, args, ModelArguments())


@pytest.fixture(scope="module")
def out(trained) -> Path:
    return Path(trained.args.output_dir)


def test_loss_is_the_distillers(trained, parts, teachers, data: DataArguments) -> None:
    args = MoveKDSFTConfig(**SETTINGS, vision_model=parts["clip"], teachers=teachers, output_dir="unused")
    model, processor = build_encoder(args, ModelArguments())
    frozen = build_teachers(args)
    distiller = build_distiller(args, model, frozen)
    rows, _ = load_train_and_validation(data, BadRows(max_share=0.1), args.seed, evaluate=True, images_only=True)
    batch = build_image_collator(args, processor, frozen)([rows[index] for index in range(8)])
    with torch.no_grad():
        features = {name: teacher(batch["teacher_pixel_values"][name]) for name, teacher in frozen.items()}
        losses = distiller(model(batch["pixel_values"]).last_hidden_state[:, 1:], features).loss
    usable = batch["image_weights"].bool()
    first = trained.state.log_history[0]
    assert first["kd"] == pytest.approx(losses[usable].mean().item(), rel=1e-5)
    assert first["loss"] == pytest.approx(0.5 * first["kd"] + 0.01 * first["balance"], rel=1e-5)


def test_everything_trains_and_bad_images_are_counted(trained, parts, teachers) -> None:
    args = MoveKDSFTConfig(**SETTINGS, vision_model=parts["clip"], teachers=teachers, output_dir="unused")
    model, _ = build_encoder(args, ModelArguments())
    new = model.state_dict()
    unchanged = [name for name, value in new.items() if torch.equal(value, trained.model.state_dict()[name])]
    assert not [name for name in unchanged if "position_ids" not in name]
    heads = build_distiller(args, model, trained.teachers).state_dict()
    assert not [
        name for name, value in heads.items() if torch.equal(value, trained.model.distiller.state_dict()[name])
    ]
    assert list(trained.bad_rows.reasons) and len(trained.bad_rows.reasons) == 1


def test_evaluation_has_the_loss_of_every_teacher(trained, out: Path) -> None:
    evaluated = next(entry for entry in trained.state.log_history if "eval_loss" in entry)
    assert evaluated["eval_loss"] == pytest.approx(0.5 * evaluated["eval_kd"] + 0.01 * evaluated["eval_balance"])
    assert {"eval_kd/clip", "eval_kd/vit", "eval_experts/0"} <= evaluated.keys()
    assert any(out.glob("pictures/step-4/*.png"))


def test_resumed_is_the_same_run(trained, out: Path, parts, teachers, data: DataArguments, tmp_path: Path) -> None:
    settings = {"vision_model": parts["clip"], "teachers": teachers, "output_dir": str(tmp_path / "resumed")}
    args = MoveKDSFTConfig(**SETTINGS | RUN, **settings, resume_from_checkpoint=str(out / "checkpoint-2"))
    stage_run.train(data, args, ModelArguments())
    for name in ("model.safetensors", "distiller.safetensors"):
        resumed, straight = load_file(tmp_path / "resumed" / name), load_file(out / name)
        assert resumed.keys() == straight.keys()
        assert not [key for key in straight if not torch.equal(resumed[key], straight[key])]


@pytest.mark.slow
def test_a_stranger_loads_it(out: Path, tmp_path: Path) -> None:
    assert load_as_stranger(out, tmp_path) == ["MoveKDVisionModel", []]


def test_card(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = write_card(out, dest=tmp_path)
    check_card(card)
    text = card.read_text(encoding="utf-8")
    assert "pipeline_tag: image-feature-extraction" in text and "### Stage 1: `encoder`" in text
    assert "language" not in json.loads((out / "training_facts.json").read_text())["hyperparameters"]
    assert "| `clip` | `clip` |" in text and "max_length" not in text and "chat_template" not in text
    Image.new("RGB", (40, 30), "red").save(tmp_path / "picture.png")
    (tmp_path / "out").symlink_to(out)
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], found)
    assert found["features"].shape == (1, 17, 32)


@pytest.mark.parametrize("key", ["vision_model", "model_name_or_path"])
def test_the_encoder_goes_on_with_its_experts_and_heads(out: Path, teachers, tmp_path: Path, key: str) -> None:
    options = SETTINGS | {"teachers": teachers, "output_dir": str(tmp_path)}
    given = {"vision_model": str(out)} if key == "vision_model" else {}
    args = MoveKDSFTConfig(**options, **given)
    model_args = ModelArguments(model_name_or_path=None if given else str(out))
    model, processor = build_encoder(args, model_args)
    saved = load_file(out / "model.safetensors")
    assert not [name for name, value in model.state_dict().items() if not torch.equal(value, saved[name])]
    distiller = build_distiller(args, model, build_teachers(args), *heads_to_continue(args, model_args))
    heads = load_file(out / "distiller.safetensors")
    assert not [name for name, value in distiller.state_dict().items() if not torch.equal(value, heads[name])]
    assert processor.crop_size["height"] == 16


def test_later_stages_take_it_as_it_is(out: Path, parts, teachers, dataset_folder: str, tmp_path: Path) -> None:
    given = {"vision_model": str(out), "language_model": parts["language"], "output_dir": str(tmp_path / "vlm")}
    options = SETTINGS | given | {"stage": "pretrain", "max_steps": 1, "teachers": teachers}
    model, _ = build_student(MoveKDSFTConfig(**options), ModelArguments())
    saved = load_file(out / "model.safetensors")
    tower = model.model.vision_tower.state_dict()
    assert tower.keys() == saved.keys() and not [key for key in saved if not torch.equal(tower[key], saved[key])]
    assert model.config.vision_feature_layer == -1
    with pytest.raises(ValueError, match="built with other options"):
        build_student(MoveKDSFTConfig(**options | {"num_experts": 2}), ModelArguments())
    alone = MoveKDSFTConfig(**options | {"teachers": teachers[:1]})
    with pytest.raises(ValueError, match="does not fit the distiller"):
        build_distiller(alone, model, build_teachers(alone), *heads_to_continue(alone, ModelArguments()))

    trainer = stage_run.train(DataArguments([dataset_folder]), MoveKDSFTConfig(**options), ModelArguments())
    kept = trainer.model.model.vision_tower.encoder.layers[0].self_attn.q_proj.weight
    assert torch.equal(kept, saved["encoder.layers.0.self_attn.q_proj.weight"]), "pretrain keeps the tower itself"
    facts = json.loads((tmp_path / "vlm" / "training_facts.json").read_text())
    assert [stage["stage"] for stage in facts["earlier_stages"]] == ["encoder"] and facts["stage"] == "pretrain"
    assert [entry["role"] for entry in facts["base_models"]] == ["vision_model", "language_model"]
    assert facts["vision_fingerprint"]
    with pytest.raises(ValueError, match="whole vision-language model"):
        build_student(MoveKDSFTConfig(**options | {"vision_model": str(tmp_path / "vlm")}), ModelArguments())
    with pytest.raises(ValueError, match="stage 'encoder' continues encoders"):
        encoder = MoveKDSFTConfig(**SETTINGS | {"teachers": teachers, "output_dir": str(tmp_path)})
        build_encoder(encoder, ModelArguments(model_name_or_path=str(tmp_path / "vlm")))


def test_a_frozen_base_and_a_tower_that_is_not_cut(parts, teachers, data: DataArguments, tmp_path: Path) -> None:
    options = SETTINGS | {"distillation_preset": "released", "freeze_base_tower": True, "max_steps": 1}
    options |= {"vision_model": parts["clip"], "teachers": teachers, "output_dir": str(tmp_path / "out")}
    data = replace(data, validation_share=0.0)
    trainer = stage_run.train(data, MoveKDSFTConfig(**options), ModelArguments())
    trains = {name for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert trains and all("expert" in name or "router" in name or "distiller." in name for name in trains)
    model = MoveKDVisionModel.from_pretrained(tmp_path / "out")
    assert len(model.encoder.layers) == 3 and model.config.add_pooling_layer


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"language_model": "a/b"}, "language_model"),
        ({"language_lora_rank": 8}, "language_lora_rank"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio"),
        ({"max_length": 512}, "max_length"),
        ({"packing": True}, "packing"),
        ({"assistant_only_loss": False}, "assistant_only_loss"),
        ({"distill_text_only_rows": True}, "distill_text_only_rows"),
        ({"distill": False}, "`distill` is false"),
        ({"freeze_vision_tower": True}, r"leaves nothing to distill into. Unfreeze the tower\.$"),
        ({"freeze_base_tower": True, "num_experts": 0}, "freeze_base_tower"),
    ],
)
def test_options_without_effect_are_refused(given: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        MoveKDSFTConfig(**SETTINGS | {"vision_model": "c/d", "teachers": ["clip"], "output_dir": "unused"} | given)


def test_an_encoder_is_no_student(out: Path, teachers, data: DataArguments, tmp_path: Path) -> None:
    settings = SETTINGS | {"stage": "finetune", "chat_template": "own", "output_dir": str(tmp_path / "out")}
    with pytest.raises(ValueError, match="is an encoder without a language model. Give it as `vision_model`"):
        build_student(MoveKDSFTConfig(**settings, teachers=teachers), ModelArguments(model_name_or_path=str(out)))


def test_a_share_for_clip_without_clip(parts, teachers, data: DataArguments, tmp_path: Path) -> None:
    given = {"vision_model": parts["clip"], "output_dir": str(tmp_path), "clip_share": 0.6}
    args = MoveKDSFTConfig(**SETTINGS | given | {"teachers": teachers[1:]})
    with pytest.raises(ValueError, match=r"`clip_share` is 0.6, but no teacher is named 'clip'"):
        stage_run.train(data, args, ModelArguments())


@pytest.mark.slow
def test_the_command(parts, images: Path, tmp_path: Path) -> None:
    arguments = ["--stage", "encoder", "--vision_model", parts["clip"], "--teachers", parts["clip"], parts["vit"]]
    arguments += ["--dataset_name", images, "--output_dir", tmp_path / "out", "--max_bad_row_share", "0.1"]
    arguments += ["--use_cpu", "true", "--bf16", "false", "--max_steps", "2", "--lora_rank", "4"]
    result = launch(ROOT / "train" / "sft.py", *arguments, launcher=("--num_processes", "1"))
    assert result.returncode == 0, result.stdout[-6000:]
    assert AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True).config.num_experts == 3
    assert AutoImageProcessor.from_pretrained(tmp_path / "out")


def test_an_encoder_keeps_its_dropout_unless_another_is_asked_for(out: Path, teachers, tmp_path: Path) -> None:
    options = {name: value for name, value in SETTINGS.items() if name != "lora_dropout"}
    options |= {"teachers": teachers, "output_dir": str(tmp_path), "vision_model": str(out)}
    args = MoveKDSFTConfig(**options)
    assert args.lora_dropout == 0.05  # the preset's; the encoder was trained without
    model, _ = build_encoder(args, ModelArguments())
    assert (model.config.lora_dropout, args.lora_dropout, args.preset_options()["lora_dropout"]) == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match=r"'lora_dropout': \(0\.0, 0\.05\)"):
        build_encoder(MoveKDSFTConfig(**options, lora_dropout=0.05), ModelArguments())
