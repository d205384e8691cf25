"""The recipes parse, their stages fit each other, and the paper's recipes have the paper's numbers."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from trl import TrlParser

from train.arguments import DataArguments, ModelArguments
from train.build_encoder import STUDENT_FIELDS
from train.config import MoveKDSFTConfig
from train.options import accumulation_steps
from train.teachers.config import resolve_teacher


FOLDER = Path(__file__).parents[2] / "train" / "recipes"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml") if not path.stem.startswith("demo_"))
PAPER = [f"{version}-{size}" for version in ("v1.0", "v1.1") for size in ("7b", "13b")]
PAIRS = [(f"{name}-pretrain", f"{name}-finetune") for name in (*PAPER, "next-7b", "small")] + [
    ("llava-7b-pretrain", f"llava-7b-finetune-{tower}") for tower in ("frozen", "unfrozen")
]
PAIRS += [("v1.0-7b-pretrain", f"v1.0-7b-finetune-{kind}") for kind in ("lora", "qlora")]

ENCODERS = ["encoder-cpu", "encoder-large", "encoder-small"]


def parse(name: str, *flags: str) -> tuple[DataArguments, MoveKDSFTConfig, ModelArguments]:
    parser = TrlParser((DataArguments, MoveKDSFTConfig, ModelArguments))
    return parser.parse_args_and_config(["--config", str(FOLDER / f"{name}.yaml"), "--use_cpu", "true", *flags])


def teacher_names(args: MoveKDSFTConfig) -> list[str]:
    return [spec if isinstance(spec, str) else spec["name"] for spec in args.teachers or []]


def test_every_recipe_is_half_of_a_pair_or_makes_an_encoder():
    assert sorted({name for pair in PAIRS for name in pair} | {*ENCODERS}) == RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_parses_and_says_what_it_means(name: str, tmp_path: Path):
    data, args, model = parse(name, "--output_dir", str(tmp_path))
    text = (FOLDER / f"{name}.yaml").read_text()
    keys = yaml.safe_load(text)
    assert keys["output_dir"] == f"outputs/{name}"
    assert args.stage in name
    assert bool(model.model_name_or_path) != bool(args.vision_model)
    assert bool(args.language_model) == (args.stage == "pretrain")
    assert data.dataset_name
    for key, value in keys.items():
        owner = next(part for part in (data, args, model) if hasattr(part, key))
        if key != "output_dir":
            # YAML reads a number like `1e-3` as text, which is not equal
            assert getattr(owner, key) in (value, [value]), key
    assert "&" not in text and "<<" not in text, "a recipe is read without anchors"


def test_unknown_key_is_refused(tmp_path: Path):
    recipe = tmp_path / "wrong.yaml"
    recipe.write_text((FOLDER / "small-pretrain.yaml").read_text() + "\nlambda_distillation: 1.0\n")
    with pytest.raises(ValueError, match="lambda_distillation"):
        parse(str(recipe.with_suffix("")))


@pytest.mark.parametrize(("pretrain", "finetune"), PAIRS)
def test_stages_of_a_pair_agree(pretrain: str, finetune: str):
    _, first, _ = parse(pretrain)
    _, second, model = parse(finetune)
    assert (first.stage, second.stage) == ("pretrain", "finetune")
    assert model.model_name_or_path == yaml.safe_load((FOLDER / f"{pretrain}.yaml").read_text())["output_dir"]
    for field in (*STUDENT_FIELDS, "image_aspect_ratio", "teachers", "distill", "distillation_preset", "cut_tower"):
        assert getattr(first, field) == getattr(second, field), field
    assert first.preset_options() == second.preset_options()


@pytest.mark.parametrize("version_and_size", PAPER)
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_paper_hyper_parameters(version_and_size: str, stage: str):
    _, args, model = parse(f"{version_and_size}-{stage}")
    expected: dict[str, Any] = {
        "learning_rate": 1e-3 if stage == "pretrain" else 2e-5,
        "global_batch_size": 256 if stage == "pretrain" else 128,
        "num_train_epochs": 1,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "weight_decay": 0.0,
        "bf16": True,
        "max_length": 2048,
        "num_experts": 3,
        "lora_rank": 32,
        "lora_alpha": 1.0,
        "lora_dropout": 0.05,
        "lambda_kd": 0.5,
        "clip_share": 0.8,
        "lambda_balance": 0.01,
        "distillation_preset": "paper",
        "image_aspect_ratio": "pad",
        "freeze_vision_tower": False,
    }
    assert {key: getattr(args, key) for key in expected} == expected
    # 3% of the steps, not 0.03 steps
    assert args.get_warmup_steps(1000) == 30
    assert teacher_names(args) == ["clip", "eva02", "convnext"] + (["sam"] if "v1.1" in version_and_size else [])
    if stage == "pretrain":
        size = version_and_size.split("-")[1]
        assert args.vision_model == "openai/clip-vit-large-patch14-336"
        assert args.language_model == f"lmsys/vicuna-{size}-v1.5"
        assert args.chat_template == "vicuna_v1"


@pytest.mark.parametrize("name", [name for name in RECIPES if not name.startswith("llava")])
def test_teachers_are_known(name: str):
    _, args, _ = parse(name)
    configs = [resolve_teacher(spec) for spec in args.teachers or []]
    assert [config.name for config in configs] == teacher_names(args)
    if args.vision_model:
        assert next(config for config in configs if config.name == "clip").model == args.vision_model


def test_controls_differ_in_the_method_alone():
    """The controls are the paper's runs without the method: same data, learning rates, batches and length."""
    method = {"teachers", "distillation_preset", "num_experts", "lora_rank", "lora_alpha", "lora_dropout", "distill"}
    own = {"output_dir", "model_name_or_path", "freeze_vision_tower"}
    for control, name in (
        ("llava-7b-pretrain", "v1.1-7b-pretrain"),
        ("llava-7b-finetune-frozen", "v1.1-7b-finetune"),
        ("llava-7b-finetune-unfrozen", "v1.1-7b-finetune"),
    ):
        plain, full = (yaml.safe_load((FOLDER / f"{stem}.yaml").read_text()) for stem in (control, name))
        differing = {key for key in plain.keys() | full.keys() if plain.get(key) != full.get(key)}
        assert differing <= method | own, differing
        assert plain["distill"] is False and plain["num_experts"] == 0
    frozen, unfrozen = (parse(f"llava-7b-finetune-{tower}")[1] for tower in ("frozen", "unfrozen"))
    assert (frozen.freeze_vision_tower, unfrozen.freeze_vision_tower) == (True, False)


def test_lora_recipes_differ_in_lora_alone():
    full, lora, qlora = (
        yaml.safe_load((FOLDER / f"v1.0-7b-finetune{kind}.yaml").read_text()) for kind in ("", "-lora", "-qlora")
    )
    llava = {
        "language_lora_rank": 128,
        "language_lora_alpha": 256,
        "language_lora_dropout": 0.05,
        "language_lora_learning_rate": 2e-4,
    }
    assert lora == full | llava | {"output_dir": "outputs/v1.0-7b-finetune-lora"}
    assert qlora == lora | {"load_in_4bit": True, "output_dir": "outputs/v1.0-7b-finetune-qlora"}


@pytest.mark.parametrize(("processes", "steps"), [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_accumulation_keeps_the_global_batch(processes: int, steps: int):
    assert accumulation_steps(128, 16, processes) == steps


def test_two_processes_accumulate_half_as_much(tmp_path: Path):
    script = tmp_path / "state_batch.py"
    script.write_text(
        "import sys\n"
        "from trl import TrlParser\n"
        "from train.arguments import DataArguments, ModelArguments\n"
        "from train.config import MoveKDSFTConfig\n"
        "parser = TrlParser((DataArguments, MoveKDSFTConfig, ModelArguments))\n"
        "_, args, _ = parser.parse_args_and_config(sys.argv[1:])\n"
        "sys.stdout.write(f'{args.batch_summary()} {args.gradient_accumulation_steps}\\n')\n"
    )
    recipe = FOLDER / "v1.0-7b-finetune.yaml"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(script), "--config", str(recipe), "--use_cpu", "true", "--output_dir", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(FOLDER.parents[1]), "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("Global batch 128: 16 per process, 4 accumulated, on 2 processes. 4") == 2


def test_global_batch_is_stated():
    _, args, _ = parse("v1.0-7b-finetune")
    assert args.batch_summary() == "Global batch 128: 16 per process, 8 accumulated, on 1 processes."
    _, args, _ = parse("small-finetune", "--per_device_train_batch_size", "32")
    assert args.batch_summary() == "Global batch 128: 32 per process, 4 accumulated, on 1 processes."


@pytest.mark.parametrize(
    ("per_device", "processes", "way_out"), [(24, 1, "32"), (16, 16, r"\[1, 2, 4, 8\]"), (1, 3, "divides")]
)
def test_batches_that_do_not_divide_are_refused(per_device: int, processes: int, way_out: str):
    with pytest.raises(ValueError, match=rf"128.*{per_device} rows on each of {processes} processes.*{way_out}"):
        accumulation_steps(128, per_device, processes)


def test_contradicting_accumulation_is_refused():
    with pytest.raises(ValueError, match="`gradient_accumulation_steps` is 4.*asks for 8"):
        parse("v1.0-7b-finetune", "--gradient_accumulation_steps", "4")


def test_one_process_that_drives_two_gpus_is_refused(monkeypatch: pytest.MonkeyPatch):
    """A step takes twice the rows asked for."""
    monkeypatch.setattr(MoveKDSFTConfig, "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match="128, but a step takes 256 rows.*accelerate launch"):
        parse("v1.0-7b-finetune")
