"""What the command prints, what it refuses, and that every recipe can be planned."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset
from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    LlamaConfig,
    SamConfig,
    SiglipVisionConfig,
    ViTImageProcessor,
)
from trl import TrlParser

from train.config import DataArguments, ModelArguments, MoveKDSFTConfig
from train.data.datasets import DataSource
from train.plan import __main__ as plan
from train.plan import memory as plan_memory
from train.plan.models import build_planned_student
from train.teachers.eva02 import Eva02DetectionConfig


RECIPES = Path(__file__).parents[3] / "train" / "recipes"


def test_days_and_sizes() -> None:
    # 8 GPUs at half of 100 TFLOP/s do 400 TFLOP in a second
    assert plan.training_days(400e12, 86_400, 8, 100, 0.5) == pytest.approx(1.0)
    assert plan.parse_memory("80GB") == 80 * 10**9
    assert plan.parse_memory("1.5 GiB") == 3 * 2**29
    for text in ("80", "80MB", "GB"):
        with pytest.raises(ValueError, match="80GB or 80GiB"):
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


def test_rows_are_counted_where_the_data_is_at_hand(dataset_folder: str, tmp_path: Path) -> None:
    def count(*names: str) -> tuple[int | None, str]:
        return plan.count_rows([DataSource(name, split="train") for name in names])

    file = tmp_path / "llava_v1_5_mix665k.json"
    assert count(str(file)) == (665_000, "as the file is named, to be checked with `--rows`")
    file.write_text(json.dumps([{"id": str(index)} for index in range(7)]))
    assert count(str(file)) == (7, "counted")
    Dataset.from_list([{"id": 1}, {"id": 2}]).to_parquet(tmp_path / "rows.parquet")
    assert count(str(tmp_path / "rows.parquet"), dataset_folder) == (50, "counted")
    rows, origin = count(dataset_folder, "elsewhere/blip_laion_cc_sbu_558k.json")
    assert rows == 558_048 and origin.startswith("counted and as the file is named")
    assert count(dataset_folder, "somebody/something")[0] is None
    assert plan.count_rows([DataSource(dataset_folder, weight=1.0, split="train")])[0] is None


def run_command(parts: dict[str, str], capsys: pytest.CaptureFixture, tmp_path: Path, *flags: str) -> str:
    recipe = (RECIPES / "small-finetune.yaml").read_text()
    for model in ("openai/clip-vit-base-patch16", "facebook/dinov2-base", "google/siglip2-base-patch16-224"):
        recipe = recipe.replace(model, parts["clip" if "clip" in model else "vit"])
    (tmp_path / "recipe.yaml").write_text(recipe)
    command = ["--config", str(tmp_path / "recipe.yaml"), "--vision_model", parts["clip"], "--language_model"]
    plan.main([*command, parts["language"], "--lora_rank", "4", *flags])
    return capsys.readouterr().out


def test_command_prints_the_plan(parts, capsys, tmp_path) -> None:
    report = run_command(parts, capsys, tmp_path, "--gpus", "4", "--gpu-memory", "24GB", "--memory-tokens", "300")
    assert "global batch 128 = 8 per GPU x 4 accumulated x 4" in report
    for backend in plan_memory.BACKENDS:
        assert f"\n{backend} " in report
    assert "fit: DDP, ZeRO-2, ZeRO-3, FSDP2." in report and "activations recomputed" in report
    # ceil(665,000 / 128)
    assert "665,000 rows (as the file is named" in report and "5,196 steps at 40% of 312 TFLOP/s" in report
    assert "estimated" in report and "`optim` adamw_torch" in report


def test_command_without_teachers_packed_and_unknown_rows(parts, capsys, tmp_path) -> None:
    """4-bit weights, cached features, 8-bit states; and nothing fits."""
    flags = ["--language_lora_rank", "4", "--load_in_4bit", "true", "--optim", "paged_adamw_8bit"]
    flags += ["--feature_cache", str(tmp_path / "features"), "--activation_checkpointing", "false"]
    size = ["--gpus", "1", "--gpu-memory", "0.01GB", "--memory-tokens", "300", "--dataset_name", "mine"]
    report = run_command(parts, capsys, tmp_path, *size, *flags)
    assert "fit: none." in report and "activations kept" in report
    assert "\nDDP " in report and "\nZeRO" not in report and "\nFSDP2" not in report
    assert "give `--rows`" in report
    assert "LoRA of the language model" in report and "`optim` paged_adamw_8bit" in report
    assert f"read from {tmp_path / 'features'}, which is not there yet, in float16" in report
    lines = [line.split() for line in report.splitlines()]
    assert ["teacher", "dinov2", "0.00", "0.00"] in lines and ["teacher", "dinov2,", "forward", "0.000"] in lines


def test_a_cache_that_is_there_is_planned_as_it_is(arguments, tmp_path: Path) -> None:
    from train.cache_writer import CacheArguments, cache_features
    from train.plan.models import build_planned_run, teacher_inputs

    settings = arguments(feature_cache=str(tmp_path / "cache"))
    cache_features(*settings, CacheArguments("int8"))
    mode, _, teachers = build_planned_run(*settings[1:], plan.torch.float32)
    with mode:
        features = {name: teacher(teacher_inputs(teacher, 3)) for name, teacher in teachers.items()}
        codes = teacher_inputs(teachers["vit"], 3)["tokens"]
    assert {name: tuple(value.tokens.shape) for name, value in features.items()} == {
        "clip": (3, 16, 32),
        "vit": (3, 36, 24),
    }
    assert codes.dtype == plan.torch.int8 and not list(teachers["vit"].parameters())
    assert features["clip"].cls_attention is not None and features["vit"].cls_attention is None
    other = arguments(
        feature_cache=str(tmp_path / "cache"), teachers=[{"name": "eye", "model": settings[1].teachers[1]["model"]}]
    )
    with pytest.raises(ValueError, match=r"has the teachers \['clip', 'vit'\], this run needs eye"):
        build_planned_run(*other[1:], plan.torch.float32)


def test_a_stage_whose_student_is_not_there_yet(arguments, parts, tmp_path) -> None:
    missing = str(tmp_path / "pretrain")
    _, args, model_args = arguments(model_name_or_path=missing, bf16=True)
    with pytest.raises(ValueError, match=r"no student in .*pretrain yet.*--vision_model"):
        plan.measure_step(args, model_args)
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
        ({"max_length": None}, "memory-tokens"),
        ({"max_length": 16}, "An image takes 16 tokens"),
    ],
)
def test_what_cannot_be_planned_is_refused(arguments, settings: dict[str, Any], message: str) -> None:
    _, args, model_args = arguments(**{"bf16": True, **settings})
    with pytest.raises(ValueError, match=message):
        plan.measure_step(args, model_args)


@pytest.fixture(scope="module")
def configurations(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Tiny models of the kinds that the recipes name, configurations alone, by a part of that name."""
    folder = tmp_path_factory.mktemp("kinds")
    size = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 2}
    kinds = {
        "clip-vit": CLIPVisionConfig(**size, image_size=28, patch_size=7),
        "dinov2": Dinov2Config(**{**size, "mlp_ratio": 1}, image_size=28, patch_size=14),
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
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_every_recipe_can_be_planned(name: str, configurations, tmp_path: Path) -> None:
    parser = TrlParser((DataArguments, MoveKDSFTConfig, ModelArguments))
    _, args, model_args = parser.parse_args_and_config(tiny_recipe(name, configurations, tmp_path))
    # Enough for the image of every recipe; longer rows only take longer to trace
    step = plan.measure_step(args, model_args, memory_tokens=128)
    single, several = (plan.plan_run(args, step, gpus) for gpus in (1, 8))
    assert set(single.memory) == set(plan_memory.usable_backends(args))
    assert (args.distill and len(args.teachers)) == len(single.teacher_flops) or not args.distill
    assert single.student_flops > 0 and all(value > 0 for value in single.teacher_flops.values())
    if args.global_batch_size is not None:
        assert single.global_batch == several.global_batch == args.global_batch_size
        assert single.accumulation == 8 * several.accumulation
        assert several.flops == single.flops
    assert several.memory["DDP"][True].communication > single.memory["DDP"][True].communication == 0
    if "ZeRO-3" in several.memory:
        assert several.memory["ZeRO-3"][True].optimizer < single.memory["ZeRO-3"][True].optimizer
    assert all(by[True].activations <= by[False].activations for by in several.memory.values())
