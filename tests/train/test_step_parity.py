"""Stage 1, and a training step from it and from the original checkpoint, against the original code."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoProcessor

from hub.convert import convert
from hub.convert_original_keys import key_from_original
from modeling_movekd import MoveKDForConditionalGeneration
from tests.helpers.colored_rows import llava_rows
from tests.helpers.original_batches import NAMES, model_inputs
from tests.helpers.original_weights import state_dict_from_original
from tests.helpers.parity import assert_gradients, assert_values, read_case, with_prefix
from train.build import build_collator, build_distiller
from train.config import MoveKDSFTConfig
from train.data.datasets import load_conversations
from train.teachers.config import TeacherConfig
from train.teachers.features import TeacherFeatures
from train.teachers.loaders import load_teacher
from train.trainer import MoveKDTrainer


pytestmark = pytest.mark.parity

ADAPTER_TOLERANCE = 3e-4


@pytest.fixture(scope="module")
def stage1(original: Path, base_models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of stage 1 and the base models."""
    vision, language = map(str, base_models)
    dest = tmp_path_factory.mktemp("stage1") / "converted"
    return convert(original / "stage1", dest, vision_model=vision, language_model=language, keep_all_layers=True)


def test_stage1_with_base_models(original: Path, stage1: Path) -> None:
    state = load_file(original / "stage1_state.safetensors")
    expected = state_dict_from_original(state)
    model = MoveKDForConditionalGeneration.from_pretrained(stage1)
    actual = model.state_dict() | with_prefix_added(load_file(stage1 / "distiller.safetensors"), "distiller.")
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(actual[key][: len(value)] if value.dim() else actual[key], value), key
    theirs = json.loads((original / "stage1" / "config.json").read_text())
    images = AutoProcessor.from_pretrained(stage1, trust_remote_code=False).image_processor
    assert images.do_pad == (theirs["image_aspect_ratio"] == "pad")
    assert json.loads((stage1 / "conversion.json").read_text())["dropped_weights"] == {}


def with_prefix_added(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + key: value for key, value in tensors.items()}


class GivenFeatures(nn.Module):
    """Stands in for a teacher with the golden features, since the golden numbers do not have its weights."""

    def __init__(self, name: str, raw: torch.Tensor) -> None:
        super().__init__()
        side = round(raw.shape[1] ** 0.5)
        self.summary_width = None
        self.grid = tuple(raw.shape[2:]) if raw.dim() == 4 else (side, side)
        tokens = raw.flatten(2).transpose(1, 2) if raw.dim() == 4 else raw
        self.config = TeacherConfig(name=name, model=name)
        self.features = TeacherFeatures(tokens, self.grid)
        self.width = tokens.shape[-1]

    def forward(self, _: None) -> TeacherFeatures:
        return self.features


class Step:
    """A trainer in the state of the golden step, with its batch."""

    def __init__(self, original: Path, stage1: Path, vision_model: Path, stage: str, output_dir: Path) -> None:
        self.tensors, metadata = read_case(original / "stage1_step.safetensors")
        model = MoveKDForConditionalGeneration.from_pretrained(stage1)
        # The row for <image> takes a small part of the softmax, and the original vocabulary has no such row
        model.lm_head.weight = nn.Parameter(model.lm_head.weight[: model.config.original_vocab_size].detach().clone())
        inputs, order = model_inputs(
            self.tensors, model.config, self.tensors["expanded_attention_mask"], self.tensors["expanded_labels"]
        )
        teachers: dict[str, Any] = {"clip": load_teacher(TeacherConfig(name="clip", model=str(vision_model)))}
        for name in metadata["teachers"]:
            if name != "CLIP":
                teachers[NAMES[name]] = GivenFeatures(NAMES[name], self.tensors[f"raw.{name}"][order])
        tower = model.config.vision_config
        args = MoveKDSFTConfig(
            output_dir=str(output_dir),
            stage=stage,
            distillation_preset="released",
            teachers=list(teachers),
            num_experts=tower.num_experts,
            lora_rank=tower.lora_rank,
            lora_alpha=tower.lora_alpha,
            lambda_kd=metadata["kd_w"],
            clip_share=metadata["kd_memory_w"],
            lambda_balance=metadata["moe_encoder_balance_w"],
            token_weighting="released" if metadata["token_weight"] else "none",
            teacher_weighting="released" if metadata["teacher_weight"] else "equal",
            bf16=False,
            use_cpu=True,
            activation_checkpointing=False,
            report_to="none",
        )
        processor = AutoProcessor.from_pretrained(stage1, trust_remote_code=False)
        self.trainer = MoveKDTrainer(
            model,
            args,
            teachers=teachers,
            distiller=build_distiller(args, model, teachers, str(stage1)),
            train_dataset=load_conversations(llava_rows(2)),
            data_collator=build_collator(args, processor, teachers),
            processing_class=processor,
        )
        self.trainer.model.eval()  # no dropout, as in the golden step
        self.args, self.order = args, order
        self.inputs = inputs | {
            "image_weights": torch.ones(len(order)),
            "teacher_pixel_values": {name: inputs["pixel_values"] if name == "clip" else None for name in teachers},
        }

    def loss(self) -> torch.Tensor:
        return self.trainer.compute_loss(self.trainer.model, dict(self.inputs))

    def terms(self) -> dict[str, float]:
        """The logged terms of the last loss with their weights, under the original names."""
        logged = {name: values[-1] for name, values in self.trainer._metrics["eval"].items()}
        return {
            "lm_loss": logged["text"],
            "kd_loss": self.args.lambda_kd * logged["kd"],
            "balancing_loss": logged["balance"],
        }


STAGES = {"stage1": "pretrain", "stage2": "finetune"}


@pytest.fixture(params=STAGES)
def stage(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def step(original: Path, stage1: Path, base_models: tuple[Path, Path], stage: str, tmp_path: Path) -> Step:
    return Step(original, stage1, base_models[0], STAGES[stage], tmp_path)


def test_training_step(original: Path, step: Step, stage: str) -> None:
    expected, _ = read_case(original / f"{stage}_step.safetensors")
    clip = step.trainer.teachers["clip"](step.inputs["pixel_values"])
    for name, value in (("tokens", clip.tokens), ("cls_embedding", clip.cls)):
        assert_values(value, step.tensors[f"clip_teacher.{name}"][step.order], f"CLIP teacher's {name}")

    loss = step.loss()
    loss.backward()
    for name, value in ({"loss": loss.item()} | step.terms()).items():
        assert value == pytest.approx(expected[name].item(), rel=1e-5), name
    gradients = {name: value.grad for name, value in step.trainer.model.named_parameters()}
    golden = state_dict_from_original(with_prefix(expected, "grad."))
    rows = step.trainer.model.config.original_vocab_size
    for name in gradients:
        if name.endswith("embed_tokens.weight") and gradients[name] is not None:
            assert not gradients[name][rows:].any()
            gradients[name] = gradients[name][:rows]
    adapters = {key: value for key, value in golden.items() if key.startswith("distiller.")}
    assert adapters
    # A bias of the keys shifts all scores of a query alike, so that its gradient is zero up to rounding
    noise = 1e-6 * max(value.abs().max().item() for value in golden.values())
    silent = {key for key in golden if key.endswith("k_proj.bias")}
    assert all(max(golden[key].abs().max(), gradients[key].abs().max()) < noise for key in silent)
    others = {key: value for key, value in golden.items() if key not in adapters.keys() | silent}
    assert_gradients(gradients, others)
    assert_gradients(gradients, adapters, tolerance=ADAPTER_TOLERANCE)
    assert {name for name, value in gradients.items() if value is not None} == golden.keys()


def test_steps_of_adamw(original: Path, step: Step, stage: str) -> None:
    golden = json.loads((original / "training_reference.json").read_text())[stage]
    settings = golden["adamw"]
    optimizer = torch.optim.AdamW(
        [value for value in step.trainer.model.parameters() if value.requires_grad],
        lr=settings["lr"],
        betas=tuple(settings["betas"]),
        eps=settings["eps"],
        weight_decay=settings["weight_decay"],
    )
    for index, expected in enumerate(golden["losses_before_each_step_then_after"]):
        loss = step.loss()
        for name, value in ({"loss": loss.item()} | step.terms()).items():
            assert value == pytest.approx(expected[name], rel=2e-4), f"{name} after {index} steps"
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert index == settings["steps"]


def test_trainable_parameters(original: Path, step: Step, stage: str) -> None:
    golden = json.loads((original / "training_reference.json").read_text())[stage]
    trains = {name for name, value in step.trainer.model.named_parameters() if value.requires_grad}
    gradients, _ = read_case(original / f"{stage}_step.safetensors")
    reached = {key_from_original(key)[0] for key in with_prefix(gradients, "grad.")}
    # The original code also trains parameters behind the used layer, which no loss reaches
    assert trains == reached
    if stage == "stage1":
        assert reached < {key_from_original(key)[0] for key in golden["trainable"]}
    else:
        assert golden["frozen"] == []
