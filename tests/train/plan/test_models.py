"""The plan of a run against runs: parameters, bytes and FLOPs as torch counts them where weights are real."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    Pix2StructConfig,
    Pix2StructForConditionalGeneration,
    PreTrainedTokenizerFast,
    TrainerCallback,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from tests.helpers.colored_rows import llava_rows
from train import run as stage_run
from train.build import build_collator, build_distiller, build_student, build_teachers, parameter_groups
from train.cache_writer import CacheArguments, cache_features
from train.data.datasets import load_conversations
from train.language_lora import language_lora_layers
from train.plan import memory as plan_memory
from train.plan.models import build_planned_run
from train.plan.report import measure_step
from train.plan.step import FLOP_FORMULAS, LiveBytes, input_bytes, measure_activations, measure_flops
from train.teachers.config import TEACHERS
from train.trainer import MoveKDTrainer


FOLDER = Path(__file__).parents[3]
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
    encoder = {"hidden_size": 64, "patch_embed_hidden_size": 768, "d_ff": 128, "d_kv": 16, "num_hidden_layers": 2}
    decoder = {"hidden_size": 32, "d_ff": 32, "num_layers": 1, "num_heads": 2, "d_kv": 16, "vocab_size": 50}
    Pix2StructForConditionalGeneration(
        Pix2StructConfig(vision_config={**encoder, "num_attention_heads": 4}, text_config=decoder)
    ).save_pretrained(folder / "pix2struct")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(TOKENIZER)
    tokenizer.save_pretrained(folder / "language")
    config = LlamaConfig(**size, vocab_size=len(tokenizer), num_key_value_heads=4, max_position_embeddings=512)
    LlamaForCausalLM(config).save_pretrained(folder / "language")
    return {path.name: str(path) for path in folder.iterdir()}


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
    CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}).save_pretrained(
        folder / "clip"
    )
    for name, sizes in VICUNA.items():
        LlamaConfig(**sizes, max_position_embeddings=4096).save_pretrained(folder / f"vicuna-{name}")
    return {path.name: str(path) for path in folder.iterdir()}


class FrozenAwareTracker(MemTracker):
    """Torch's tracker, which otherwise asks frozen parameters for a gradient too."""

    def _track_module_params_and_buffers(self, module: nn.Module, install_grad_hooks: bool = True) -> tuple[int, int]:
        trains = all(parameter.requires_grad for parameter in module.parameters())
        return super()._track_module_params_and_buffers(module, install_grad_hooks and trains)


def real_trainer(arguments: Any, parts: dict[str, str], **overrides: Any) -> tuple[MoveKDTrainer, Any, Any]:
    names = overrides.pop("teachers", ["clip", "vit"])
    teachers = names and [{"name": name, "model": parts[name]} for name in names]
    for teacher in teachers or []:
        if teacher["name"] == "pix2struct":
            teacher["image_size"] = 128
    named = {"vision_model": parts["clip"], "language_model": parts["language"], "teachers": teachers}
    data_args, args, model_args = arguments(**named | overrides)
    rows = llava_rows(args.per_device_train_batch_size * args.gradient_accumulation_steps)
    if args.feature_cache is not None:
        args.feature_cache = str(Path(args.output_dir).parent / args.feature_cache)
        data_args.dataset_name = str(Path(args.output_dir).parent / "rows")
        Dataset.from_list(rows).save_to_disk(data_args.dataset_name)
        cache_features(data_args, args, model_args, CacheArguments())
        rows = data_args.dataset_name
    model, processor = build_student(args, model_args)
    teachers_loaded = build_teachers(args)
    trainer = MoveKDTrainer(
        model,
        args,
        teachers=teachers_loaded,
        distiller=build_distiller(args, model, teachers_loaded),
        train_dataset=load_conversations(rows),
        data_collator=build_collator(args, processor, teachers_loaded),
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


def scale_bytes(layer: Any) -> int:
    """Of the scales of bitsandbytes' 4-bit weight under LoRA; 0 where there is none."""
    state = getattr(layer.get_base_layer().weight, "quant_state", None)
    if state is None:
        return 0
    tensors = [state.absmax, state.code] + (
        [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
    )
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize(
    "settings",
    [
        {"stage": "finetune"},
        {"stage": "finetune", "activation_checkpointing": True},
        {"stage": "pretrain"},
        {"stage": "finetune", "bf16": True},
        {"stage": "finetune", "distillation_preset": "student_heads"},
        {"stage": "finetune", "distill": False, "teachers": None, "num_experts": 0},
        {"language_lora_rank": 16},
        {"language_lora_rank": 16, "load_in_4bit": True, "activation_checkpointing": True},
        {"feature_cache": "features"},
        {"teachers": ["clip", "pix2struct"]},
    ],
    ids=["kept", "recomputed", "pretrain", "autocast", "student_heads", "plain", "lora", "qlora", "cached", "patches"],
)
def test_bytes_agree_with_torchs_tracker(arguments, parts, settings: dict[str, Any]) -> None:
    accumulated = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "max_steps": 2}
    trainer, args, model_args = real_trainer(arguments, parts, **accumulated, **settings)
    if trainer.teachers and args.distillation_preset == "student_heads":
        with torch.no_grad():
            stage_run.fit_feature_statistics(
                args, trainer.model.distiller, trainer.teachers, trainer.train_dataset, trainer.data_collator
            )
    watch = TrackedMicroBatch(trainer)
    trainer.add_callback(watch)
    trainer.train()
    measured = watch.peak()
    length = trainer.data_collator(list(trainer.train_dataset)[:8])["input_ids"].shape[1]

    run = build_planned_run(args, model_args)
    activations = measure_activations(run, length, autocast=args.bf16)
    planned = plan_memory.sharded_memory("DDP", run.model, args, 1)
    for counted, real in zip(parameter_groups(run.model), parameter_groups(trainer.model), strict=True):
        assert counted.keys() == real.keys()
        assert sum(counted.values()) == pytest.approx(sum(real.values()), rel=1e-3)
    # The tracker does not see the scales of packed weights, which are no parameters
    weights = planned["weights"] - sum(map(scale_bytes, language_lora_layers(trainer.model).values()))
    teacher_bytes = sum(value.nbytes for teacher in run.teachers.values() for value in teacher.parameters())
    assert weights + teacher_bytes == pytest.approx(measured["Parameter"], rel=1e-3)
    assert planned["gradients"] == pytest.approx(measured["Gradient"], rel=1e-3)
    # The tracker counts the step numbers too
    assert planned["optimizer"] == pytest.approx(measured["Optstate"], rel=1e-3, abs=4000)
    total = measured["Activation"] + measured["Temp"]
    print(f"activations: planned {activations:,}, tracked {total:,} ({activations / total - 1:+.1%})")
    assert activations == pytest.approx(total, rel=0.15)
    in_all = sum(planned.values()) + teacher_bytes + activations
    assert in_all == pytest.approx(measured["Total"] - measured["Buffer"], rel=0.15)


def test_flops_agree_with_a_real_step(arguments, parts) -> None:
    trainer, args, model_args = real_trainer(arguments, parts, per_device_train_batch_size=8)
    trainer.current_gradient_accumulation_steps = 1
    (batch,), count = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, trainer.args.device)
    with FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS) as counter:
        trainer.training_step(trainer.model, dict(batch), count)
    planned = measure_flops(build_planned_run(args, model_args), batch["input_ids"].shape[1])
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
    flops = measure_flops(build_planned_run(args, model_args), 1024)["student"]
    linear = 6 * (6.607e9 * 1024 + 0.29e9 * 577 + 21e6 * 576)
    assert 1.0 < flops / linear < 1.1


def test_tiles_of_anyres_are_planned(arguments, parts) -> None:
    """The most tiles an image can have: five crops through the tower, the whole image and a grid of two by two."""
    named = {"vision_model": parts["clip"], "language_model": parts["language"], "distill": False, "teachers": None}
    _, args, model_args = arguments(**named, image_aspect_ratio="anyres")
    tokens = 144 + 24 * 25
    with pytest.raises(ValueError, match=f"An image takes {tokens} tokens, the whole sequence has {tokens}"):
        measure_step(args, model_args, tokens)
    step = measure_step(args, model_args, tokens + 1)
    assert step.row_flops["student"] > 0 and step.activations["DDP"] > 0


def test_teachers_see_every_tile_if_asked_to(arguments, parts) -> None:
    """Five crops, where the whole image alone is one."""
    flops = {}
    for tiles in ("base", "all"):
        teachers = [{"name": "vit", "model": parts["vit"]}]
        named = {"vision_model": parts["clip"], "language_model": parts["language"], "teachers": teachers}
        _, args, model_args = arguments(
            **named,
            image_aspect_ratio="anyres",
            distill_tiles=tiles,
            teacher_weighting="equal",
            token_weighting="none",
        )
        flops[tiles] = measure_flops(build_planned_run(args, model_args), 800)
    assert flops["all"]["vit"] == 5 * flops["base"]["vit"]
    assert flops["all"]["student"] > flops["base"]["student"]


def test_inputs_are_what_the_collator_makes(arguments, parts) -> None:
    trainer, args, model_args = real_trainer(arguments, parts, per_device_train_batch_size=4)
    batch = trainer.data_collator(list(trainer.train_dataset))
    tensors = [batch[name] for name in ("pixel_values", "input_ids", "attention_mask", "labels")]
    tensors += batch["teacher_pixel_values"].values()
    planned = 4 * input_bytes(build_planned_run(args, model_args), batch["input_ids"].shape[1])
    assert planned == sum(tensor.nbytes for tensor in tensors)


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
    run = build_planned_run(args, model_args)
    trained, frozen = parameter_groups(run.model)
    width = {"7b": 4096, "13b": 5120}[name]
    router, experts = 3 * 1024 + 3, 2 * 3 * 32 * (1024 + 4096)
    assert frozen["language model"] == language + 2 * width
    assert trained["experts and routers"] == 23 * (router + experts)
    assert trained["projector"] == 1024 * width + width + width * width + width
    assert trained["distiller"] == 3072 * 1024 + 1024 + 1024 * 576 + 576
    assert set(trained) == {"experts and routers", "projector", "distiller"}
    assert frozen["vision tower"] == sum(value.numel() for value in run.teachers["clip"].model.parameters())
    convnext = sum(value.numel() for value in run.teachers["convnext"].model.parameters())
    assert convnext == pytest.approx(TEACHERS["convnext"].num_parameters, rel=1e-3)


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
