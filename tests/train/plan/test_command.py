"""What the command prints, what it refuses, and that every recipe can be planned."""

from argparse import ArgumentTypeError
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    DINOv3ViTConfig,
    LlamaConfig,
    SamConfig,
    SiglipVisionConfig,
    ViTImageProcessor,
)
from trl import TrlParser

from train.arguments import DataArguments, ModelArguments
from train.cache_writer import CacheArguments, cache_features
from train.config import MoveKDSFTConfig
from train.plan import __main__ as plan
from train.plan import memory as plan_memory
from train.plan import report as plan_report
from train.plan.models import build_planned_run, build_planned_student
from train.plan.step import teacher_inputs
from train.teachers.eva02 import Eva02DetectionConfig


RECIPES = Path(__file__).parents[3] / "train" / "recipes"


def test_days_and_sizes() -> None:
    # 8 GPUs at half of 100 TFLOP/s do 400 TFLOP in a second
    assert plan_report.training_days(400e12, 86_400, 8, 100, 0.5) == pytest.approx(1.0)
    assert plan.parse_memory("80GB") == 80 * 10**9
    assert plan.parse_memory("1.5 GiB") == 3 * 2**29
    for text in ("80", "80MB", "GB"):
        with pytest.raises(ArgumentTypeError, match="80GB or 80GiB"):
            plan.parse_memory(text)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpus", "8", "--gpu-memory", "80"], "The memory is '80'; write it as 80GB or 80GiB."),
        (["--gpus", "0", "--gpu-memory", "80GB"], "--gpus is 0; it goes from 1"),
        (
            ["--gpus", "8", "--gpu-memory", "80GB", "--utilization", "40"],
            "--utilization is 40.0; it goes from 0.01 to 1",
        ),
    ],
)
def test_flags_of_the_command(flags: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        plan.main(["--config", str(RECIPES / "small-pretrain.yaml"), *flags])
    assert message in capsys.readouterr().err


def run_command(parts: dict[str, str], capsys: pytest.CaptureFixture, tmp_path: Path, *flags: str) -> str:
    recipe = (RECIPES / "small-finetune.yaml").read_text()
    for model in ("openai/clip-vit-base-patch16", "facebook/dinov2-base", "google/siglip2-base-patch16-224"):
        recipe = recipe.replace(model, parts["clip" if "clip" in model else "vit"])
    (tmp_path / "recipe.yaml").write_text(recipe)
    command = ["--config", str(tmp_path / "recipe.yaml"), "--vision_model", parts["clip"], "--language_model"]
    plan.main([*command, parts["language"], "--lora_rank", "4", *flags])
    return capsys.readouterr().out


def test_command_prints_the_plan(parts, capsys, tmp_path) -> None:
    size = ["--gpus", "4", "--gpu-memory", "24GB", "--tokens", "300", "--rows", "665000"]
    report = run_command(parts, capsys, tmp_path, *size)
    assert "global batch 128 = 8 per GPU x 4 accumulated x 4" in report
    for backend in plan_memory.BACKENDS:
        assert f"\n{backend} " in report
    assert "fit: DDP, ZeRO-2, ZeRO-3, FSDP2." in report and "activations recomputed" in report
    # ceil(665,000 / 128)
    assert "665,000 rows, 1 times" in report and "5,196 steps at 40% of 312 TFLOP/s" in report
    assert "estimated" in report and "`optim` adamw_torch" in report


def test_command_with_packed_weights_and_unknown_rows(parts, capsys, tmp_path) -> None:
    """4-bit weights and 8-bit states; and nothing fits."""
    flags = ["--language_lora_rank", "4", "--load_in_4bit", "true", "--optim", "paged_adamw_8bit"]
    flags += ["--activation_checkpointing", "false"]
    size = ["--gpus", "1", "--gpu-memory", "0.01GB", "--tokens", "300"]
    report = run_command(parts, capsys, tmp_path, *size, *flags)
    assert "fit: none." in report and "activations kept" in report
    assert "\nDDP " in report and "\nZeRO" not in report and "\nFSDP2" not in report
    assert "Give `--rows`" in report
    assert "LoRA of the language model" in report and "`optim` paged_adamw_8bit" in report


def test_a_feature_cache_is_planned_as_it_is(arguments, tmp_path: Path) -> None:
    settings = arguments(feature_cache=str(tmp_path / "cache"))
    cache_features(*settings, CacheArguments("int8"))
    run = build_planned_run(*settings[1:])
    with run.mode:
        features = {name: teacher(teacher_inputs(teacher, 3)) for name, teacher in run.teachers.items()}
        codes = teacher_inputs(run.teachers["vit"], 3)["tokens"]
    assert {name: tuple(value.tokens.shape) for name, value in features.items()} == {
        "clip": (3, 16, 32),
        "vit": (3, 36, 24),
    }
    assert codes.dtype == torch.int8 and not list(run.teachers["vit"].parameters())
    assert features["clip"].cls_attention is not None and features["vit"].cls_attention is None
    other = arguments(
        feature_cache=str(tmp_path / "cache"), teachers=[{"name": "eye", "model": settings[1].teachers[1]["model"]}]
    )
    with pytest.raises(ValueError, match=r"has the teachers \['clip', 'vit'\], this run needs eye"):
        build_planned_run(*other[1:])
    step = plan_report.measure_step(*settings[1:], tokens=64)
    report = plan_report.format_plan(step, 1, 10**9, None, 312, 0.4)
    assert f"read from {tmp_path / 'cache'}." in report
    lines = [line.split() for line in report.splitlines()]
    assert ["teacher", "vit", "0.00", "0.00"] in lines and ["teacher", "vit,", "forward", "0.000"] in lines
    missing = arguments(feature_cache=str(tmp_path / "missing"))
    with pytest.raises(ValueError, match=r"has no index.json\. Run `python -m train.feature_cache`"):
        build_planned_run(*missing[1:])


def test_a_stage_whose_student_is_not_there_yet(arguments, parts, tmp_path) -> None:
    missing = str(tmp_path / "pretrain")
    _, args, model_args = arguments(model_name_or_path=missing, bf16=True)
    with pytest.raises(ValueError, match=r"no student in .*pretrain yet.*--vision_model"):
        plan_report.measure_step(args, model_args)
    args.vision_model, args.language_model = parts["clip"], parts["language"]
    model = build_planned_student(args, model_args)
    assert model.device.type == "meta"
    # Once it is there, it is what the run continues
    model.config.save_pretrained(missing)
    args.num_experts = 5
    assert build_planned_student(args, model_args).config.vision_config.num_experts == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optim": "lomo"}, "`optim` is lomo"),
        ({"max_length": None}, "--tokens"),
        ({"max_length": 16}, "An image takes 16 tokens"),
    ],
)
def test_what_cannot_be_planned_is_refused(arguments, settings: dict[str, Any], message: str) -> None:
    _, args, model_args = arguments(**{"bf16": True, **settings})
    with pytest.raises(ValueError, match=message):
        plan_report.measure_step(args, model_args)


@pytest.fixture(scope="module")
def configurations(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Tiny models of the kinds that the recipes name, configurations alone, by a part of that name."""
    folder = tmp_path_factory.mktemp("kinds")
    size = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 2}
    kinds = {
        "clip-vit": CLIPVisionConfig(**size, image_size=28, patch_size=7),
        "dinov2": Dinov2Config(**{**size, "mlp_ratio": 1}, image_size=28, patch_size=14),
        "dinov3": DINOv3ViTConfig(**size, image_size=32, patch_size=16),
        "siglip2": SiglipVisionConfig(**size, image_size=32, patch_size=16),
        "sam": SamConfig(vision_config={**size, "image_size": 64, "patch_size": 16, "output_channels": 8}),
        "eva02": Eva02DetectionConfig(**size, image_size=64, patch_size=16),
        "vicuna": LlamaConfig(**size, vocab_size=100, num_key_value_heads=2),
    }
    for name, config in kinds.items():
        config.save_pretrained(folder / name)
        side = getattr(getattr(config, "vision_config", config), "image_size", 32)
        ViTImageProcessor(size={"height": side, "width": side}).save_pretrained(folder / name)
    return {name: str(folder / name) for name in kinds} | {"SmolLM2": str(folder / "vicuna")}


def tiny_recipe(name: str, configurations: dict[str, str], folder: Path) -> list[str]:
    """The recipe with a tiny model in place of each that it names, and the student of the stage before."""

    def tiny(model: str) -> str:
        kind = next((path for part, path in configurations.items() if part in model), None)
        return kind or model

    recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    for key in ("vision_model", "language_model"):
        if key in recipe:
            recipe[key] = tiny(recipe[key])
    if name.startswith("demo") and "model_name_or_path" in recipe:
        # Its teachers are the small networks that are shipped, so the student is made of those too
        del recipe["model_name_or_path"]
        recipe |= {"vision_model": "train/demo/weights/clip", "language_model": "train/demo/weights/language_model"}
    elif "model_name_or_path" in recipe:
        recipe |= {"vision_model": configurations["clip-vit"], "language_model": configurations["vicuna"]}
    for teacher in recipe.get("teachers", []):
        named = teacher.get(
            "model", {"clip": "clip-vit", "convnext": "convnext_atto"}.get(teacher["name"], teacher["name"])
        )
        teacher |= {"model": tiny(named)} | ({"image_size": 64} if named == "convnext_atto" else {})
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return ["--config", str(path), "--use_cpu", "true"]


# One of each kind by default, all of them in the slow run
QUICK = ("v1.1-7b-pretrain", "v1.0-7b-finetune-qlora", "next-7b-finetune", "llava-7b-finetune-frozen")
# With tiny models, a recipe of 13B is the same as that of 7B
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml") if "13b" not in path.stem)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_every_recipe_can_be_planned(name: str, configurations, tmp_path: Path) -> None:
    parser = TrlParser((DataArguments, MoveKDSFTConfig, ModelArguments))
    _, args, model_args = parser.parse_args_and_config(tiny_recipe(name, configurations, tmp_path))
    # Enough for the image of every recipe; longer rows only take longer to trace
    step = plan_report.measure_step(args, model_args, tokens=None if args.stage == "encoder" else 128)
    single, several = (plan_report.backend_memory(step, gpus) for gpus in (1, 8))
    assert set(single) == set(plan_memory.usable_backends(args))
    assert len(step.row_flops) == 1 + (len(args.teachers) if args.distill else 0)
    assert all(value > 0 for value in step.row_flops.values())
    if args.global_batch_size is not None:
        assert plan_report.accumulated(args, 1) == 8 * plan_report.accumulated(args, 8)
        assert plan_report.accumulated(args, 8) * 8 * args.per_device_train_batch_size == args.global_batch_size
    assert several["DDP"]["buffers"] > single["DDP"]["buffers"] == 0
    if "ZeRO-3" in several:
        assert several["ZeRO-3"]["optimizer"] < single["ZeRO-3"]["optimizer"]
