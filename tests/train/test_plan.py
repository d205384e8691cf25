"""The plan of a run against runs: parameters, bytes and FLOPs as torch counts them where weights are real."""

from pathlib import Path
from typing import Any

import pytest
import torch
from colours import llava_rows
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from train import plan, sft
from train.build import build_distiller, build_student, build_teachers
from train.data import load_conversations
from train.plan_step import (
    FLOP_FORMULAS,
    LiveBytes,
    build_planned_run,
    build_planned_student,
    measure_activations,
    measure_flops,
)
from train.teachers import TEACHERS
from train.trainer import MoveKDTrainer


FOLDER = Path(__file__).parents[2]
TOKENIZER = FOLDER / "tests" / "fixtures" / "parity" / "conversation" / "tokenizer"
VICUNA = {
    "7b": {},
    "13b": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
    },
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """As the parts of all training tests, but large enough that activations outweigh the head's tile of logits."""
    folder = tmp_path_factory.mktemp("larger_parts")
    torch.manual_seed(0)
    size = {"hidden_size": 192, "intermediate_size": 768, "num_attention_heads": 4, "num_hidden_layers": 4}
    CLIPVisionModel(CLIPVisionConfig(**size, image_size=96, patch_size=8)).save_pretrained(folder / "clip")
    CLIPImageProcessor(size={"shortest_edge": 96}, crop_size={"height": 96, "width": 96}).save_pretrained(
        folder / "clip"
    )
    ViTModel(ViTConfig(**size, image_size=128, patch_size=16), add_pooling_layer=False).save_pretrained(folder / "vit")
    ViTImageProcessor(size={"height": 128, "width": 128}).save_pretrained(folder / "vit")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(TOKENIZER)
    tokenizer.save_pretrained(folder / "language")
    config = LlamaConfig(**size, vocab_size=len(tokenizer), num_key_value_heads=4, max_position_embeddings=512)
    LlamaForCausalLM(config).save_pretrained(folder / "language")
    return {name: str(folder / name) for name in ("clip", "vit", "language")}


@pytest.fixture(scope="module")
def full_size_parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Configurations, and nothing else, of the models that the recipes name."""
    folder = tmp_path_factory.mktemp("configurations")
    CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    ).save_pretrained(folder / "clip")
    for name, sizes in VICUNA.items():
        LlamaConfig(**sizes, max_position_embeddings=4096).save_pretrained(folder / f"vicuna-{name}")
    return {path.name: str(path) for path in folder.iterdir()}


class FrozenAwareTracker(MemTracker):
    """Torch's tracker, which otherwise asks frozen parameters for a gradient too."""

    def _track_module_params_and_buffers(self, module: nn.Module, install_grad_hooks: bool = True) -> tuple[int, int]:
        trains = all(parameter.requires_grad for parameter in module.parameters())
        return super()._track_module_params_and_buffers(module, install_grad_hooks and trains)


def real_trainer(arguments: Any, parts: dict[str, str], **overrides: Any) -> tuple[MoveKDTrainer, Any, Any]:
    teachers = [{"name": "clip", "model": parts["clip"]}, {"name": "vit", "model": parts["vit"]}]
    named = {"vision_model": parts["clip"], "language_model": parts["language"], "teachers": teachers}
    _, args, model_args = arguments(**named | overrides)
    model, processor = build_student(args, model_args)
    teachers_loaded = build_teachers(args)
    distiller = build_distiller(args, model, teachers_loaded)
    dataset = load_conversations(llava_rows(args.per_device_train_batch_size * args.gradient_accumulation_steps))
    collator = sft.build_collator(args, processor, teachers_loaded)
    trainer = MoveKDTrainer(
        model,
        args,
        teachers=teachers_loaded,
        distiller=distiller,
        train_dataset=dataset,
        data_collator=collator,
        processing_class=processor,
    )
    return trainer, args, model_args


class TrackedMicroBatch(TrainerCallback):
    """Has torch's tracker watch the last micro-batch of a run of two steps of two, when all states are there."""

    def __init__(self, trainer: MoveKDTrainer) -> None:
        self.trainer = trainer
        self.tracker = FrozenAwareTracker()

    def on_substep_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == 1:
            trainer = self.trainer
            self.tracker.track_external(trainer.model, *trainer.teachers.values(), trainer.optimizer.optimizer)
            self.tracker.__enter__()

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        if state.global_step == 1:
            self.tracker.__exit__(None, None, None)

    def peak(self) -> dict[str, int]:
        (snapshot,) = self.tracker.get_tracker_snapshot("peak").values()
        return {getattr(kind, "value", kind): size for kind, size in snapshot.items()}


@pytest.mark.parametrize(
    "settings",
    [
        {"stage": "finetune"},
        {"stage": "finetune", "activation_checkpointing": True},
        {"stage": "pretrain"},
        {"stage": "finetune", "bf16": True},
        {"stage": "finetune", "distillation_preset": "student_heads"},
        {"stage": "finetune", "distill": False, "teachers": None, "num_experts": 0},
    ],
    ids=["kept", "recomputed", "pretrain", "autocast", "student_heads", "plain"],
)
def test_bytes_agree_with_torchs_tracker(arguments, parts, settings: dict[str, Any]) -> None:
    accumulated = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "max_steps": 2}
    trainer, args, model_args = real_trainer(arguments, parts, **accumulated, **settings)
    if trainer.teachers and args.distillation_preset == "student_heads":
        with torch.no_grad():
            sft.fit_feature_statistics(
                args, trainer.model.distiller, trainer.teachers, trainer.train_dataset, trainer.data_collator
            )
    watch = TrackedMicroBatch(trainer)
    trainer.add_callback(watch)
    trainer.train()
    measured = watch.peak()
    length = trainer.data_collator(list(trainer.train_dataset)[:8])["input_ids"].shape[1]

    checkpointing = bool(args.activation_checkpointing)
    _, model, teachers = build_planned_run(args, model_args, torch.float32)
    counts = plan.count_parameters(model)
    activations = measure_activations(
        args, model_args, 8, length, torch.float32, autocast=args.bf16, checkpointing=checkpointing
    )
    teacher_bytes = sum(teacher.bytes for teacher in teachers.values())
    planned = plan.sharded_memory("DDP", counts, 1, torch.float32, teacher_bytes, activations)
    real = {"trained": 0, "frozen": 0}
    for parameter in trainer.model.parameters():
        real["trained" if parameter.requires_grad else "frozen"] += parameter.numel()
    assert sum(counts.trained.values()) == pytest.approx(real["trained"], rel=1e-3)
    assert planned.weights + planned.teachers == pytest.approx(measured["Parameter"], rel=1e-3)
    assert planned.gradients == pytest.approx(measured["Gradient"], rel=1e-3)
    assert planned.optimizer == pytest.approx(measured["Optstate"], rel=1e-3)
    total = measured["Activation"] + measured["Temp"]
    print(f"activations: planned {activations:,}, tracked {total:,} ({activations / total - 1:+.1%})")
    assert activations == pytest.approx(total, rel=0.15)
    assert planned.total == pytest.approx(measured["Total"] - measured["Buffer"], rel=0.15)


def test_flops_agree_with_a_real_step(arguments, parts) -> None:
    trainer, args, model_args = real_trainer(arguments, parts, per_device_train_batch_size=8)
    trainer.current_gradient_accumulation_steps = 1
    (batch,), count = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, trainer.args.device)
    with FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS) as counter:
        trainer.training_step(trainer.model, dict(batch), count)
    planned = measure_flops(args, model_args, batch["input_ids"].shape[1])
    assert set(planned) == {"clip", "vit", "student"}
    assert 8 * sum(planned.values()) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_flops_of_the_student_are_six_per_parameter_and_token(arguments, full_size_parts) -> None:
    """The rule of thumb, on the whole of Vicuna-7B: the excess is attention and the head's recomputed tiles."""
    _, args, model_args = arguments(
        vision_model=full_size_parts["clip"],
        language_model=full_size_parts["vicuna-7b"],
        distill=False,
        teachers=None,
        num_experts=0,
    )
    flops = measure_flops(args, model_args, 1024)["student"]
    linear = 6 * (6.607e9 * 1024 + 0.29e9 * 577 + 21e6 * 576)
    assert 1.0 < flops / linear < 1.1


def test_tiles_of_anyres_are_planned(arguments, parts) -> None:
    """The most tiles an image can have: five crops through the tower, the whole image and a grid of two by two."""
    named = {"vision_model": parts["clip"], "language_model": parts["language"], "distill": False, "teachers": None}
    _, args, model_args = arguments(**named, image_aspect_ratio="anyres")
    tokens = 144 + 24 * 25
    with pytest.raises(ValueError, match=f"An image takes {tokens} tokens, the whole sequence has {tokens}"):
        measure_flops(args, model_args, tokens)
    assert measure_flops(args, model_args, tokens + 1)["student"] > 0
    assert measure_activations(args, model_args, 1, tokens + 1, torch.float32, False, True) > 0


@pytest.mark.parametrize(("name", "language"), [("7b", 6_738_415_616), ("13b", 13_015_864_320)])
def test_parameters_of_the_paper(arguments, full_size_parts, name: str, language: int) -> None:
    """Vicuna's published counts with a row for `<image>` in and out; 23 layers of CLIP-L and what MoLE adds."""
    _, args, model_args = arguments(
        stage="pretrain",
        lora_rank=32,
        vision_model=full_size_parts["clip"],
        language_model=full_size_parts[f"vicuna-{name}"],
        teachers=[{"name": "clip", "model": full_size_parts["clip"]}, "convnext"],
    )
    _, model, teachers = build_planned_run(args, model_args, torch.float32)
    counts = plan.count_parameters(model)
    width = {"7b": 4096, "13b": 5120}[name]
    router, experts = 3 * 1024 + 3, 2 * 3 * 32 * (1024 + 4096)
    assert counts.frozen["language model"] == language + 2 * width
    assert counts.trained["experts and routers"] == 23 * (router + experts)
    assert counts.trained["projector"] == 1024 * width + width + width * width + width
    assert counts.trained["distiller"] == 3072 * 1024 + 1024 + 1024 * 576 + 576
    assert set(counts.trained) == {"experts and routers", "projector", "distiller"}
    assert counts.frozen["vision tower"] == sum(value.numel() for value in teachers["clip"].model.parameters())
    convnext = sum(value.numel() for value in teachers["convnext"].model.parameters())
    assert convnext == pytest.approx(TEACHERS["convnext"].num_parameters, rel=1e-3)


COUNTS = plan.ParameterCounts({"language model": 4000}, {"vision tower": 1000}, largest_layer=100, outside_layers=50)


@pytest.mark.parametrize(
    ("backend", "expected"),
    [
        ("DDP", (20_000, 16_000, 32_000, 7, 16_000)),
        ("ZeRO-2", (10_000, 2_000, 12_000, 7, 8_000)),
        ("ZeRO-3", (2_500, 2_000, 12_000, 7, 18_000)),
        ("FSDP2", (5_000, 4_000, 8_000, 7, 500)),
    ],
)
def test_bytes_of_each_backend_by_hand(backend: str, expected: tuple[int, ...]) -> None:
    memory = plan.sharded_memory(backend, COUNTS, 4, torch.float32, teachers=7, activations=11)
    assert (memory.weights, memory.gradients, memory.optimizer, memory.teachers, memory.communication) == expected
    assert memory.total == sum(expected) + 11


def test_one_gpu_has_nobody_to_exchange_with() -> None:
    assert plan.sharded_memory("DDP", COUNTS, 1, torch.float32, 0, 0).communication == 0
    assert plan.sharded_memory("FSDP2", COUNTS, 1, torch.float32, 0, 0).communication == 0


def test_live_bytes_count_what_lives() -> None:
    before = torch.zeros(1000)
    memory = LiveBytes()
    memory.ignore(before)
    with memory:
        before.add_(1)
        view = before[:10]
        first = view + 1
        second = torch.zeros(100)
        del second
        third = torch.zeros(50, dtype=torch.bfloat16)
    assert memory.peak == 40 + 400
    assert memory.current == first.nbytes + third.nbytes == 140


def test_days_and_sizes() -> None:
    # 8 GPUs at half of 100 TFLOP/s do 400 TFLOP in a second
    assert plan.training_days(400e12, 86_400, 8, 100, 0.5) == pytest.approx(1.0)
    assert plan.parse_memory("80GB") == 80 * 10**9
    assert plan.parse_memory("1.5 GiB") == 3 * 2**29
    assert plan.known_rows(["elsewhere/llava_v1_5_mix665k.json"]) == 665_298
    assert plan.known_rows(["a/llava_v1_5_mix665k.json", "blip_laion_cc_sbu_558k.json"]) == 665_298 + 558_128
    assert plan.known_rows(["a/llava_v1_5_mix665k.json", "mine.json"]) is None
    for text in ("80", "80MB", "GB"):
        with pytest.raises(ValueError, match="80GB or 80GiB"):
            plan.parse_memory(text)
    with pytest.raises(ValueError, match="expected one of"):
        plan.sharded_memory("ZeRO-1", COUNTS, 4, torch.float32, 0, 0)


def run_command(parts: dict[str, str], capsys: pytest.CaptureFixture, tmp_path: Path, *flags: str) -> str:
    recipe = (FOLDER / "train" / "recipes" / "small-finetune.yaml").read_text()
    for model in ("openai/clip-vit-base-patch16", "facebook/dinov2-base", "google/siglip2-base-patch16-224"):
        recipe = recipe.replace(model, parts["clip" if "clip" in model else "vit"])
    (tmp_path / "recipe.yaml").write_text(recipe)
    command = ["--config", str(tmp_path / "recipe.yaml"), "--vision_model", parts["clip"], "--language_model"]
    plan.main([*command, parts["language"], "--lora_rank", "4", *flags])
    return capsys.readouterr().out


def test_command_prints_the_plan(parts, capsys, tmp_path) -> None:
    report = run_command(parts, capsys, tmp_path, "--gpus", "4", "--gpu-memory", "24GB", "--mean-tokens", "200")
    assert "global batch 128 = 8 per GPU x 4 accumulated x 4" in report
    for backend in plan.BACKENDS:
        assert f"\n{backend} " in report
    assert "fit: DDP, ZeRO-2, ZeRO-3, FSDP2." in report
    # ceil(665,298 / 128)
    assert "5,198 steps at 40% of 312 TFLOP/s" in report
    assert "estimated" in report


def test_command_says_that_nothing_fits(parts, capsys, tmp_path) -> None:
    report = run_command(parts, capsys, tmp_path, "--gpus", "1", "--gpu-memory", "0.01GB", "--dataset_name", "mine")
    assert "fit: none." in report
    assert "give `--rows`" in report


def test_a_stage_whose_student_is_not_there_yet(arguments, parts, tmp_path) -> None:
    missing = str(tmp_path / "pretrain")
    _, args, model_args = arguments(model_name_or_path=missing, bf16=True)
    with pytest.raises(ValueError, match=r"no student in .*pretrain yet.*--vision_model"):
        plan.plan_run(args, model_args, gpus=1)
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
        ({"bf16": True, "optim": "sgd"}, "`optim` is sgd"),
        ({"bf16": False}, "`bf16` is false"),
        ({"bf16": True, "max_length": None}, "memory-tokens"),
        ({"bf16": True, "max_length": 40}, "An image takes 144 tokens"),
        ({"bf16": True, "language_lora_rank": 8}, "language_lora_rank"),
        ({"bf16": True, "feature_cache": "features"}, "feature_cache"),
    ],
)
def test_what_cannot_be_planned_is_refused(arguments, parts, settings: dict[str, Any], message: str) -> None:
    _, args, model_args = arguments(vision_model=parts["clip"], language_model=parts["language"], **settings)
    with pytest.raises(ValueError, match=message):
        plan.plan_run(args, model_args, gpus=1)
