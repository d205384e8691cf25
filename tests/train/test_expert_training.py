"""Training of experts and routers: the bias that balances the load, and an expert for each teacher."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from modeling_movekd import MoveKDVisionConfig, MoveKDVisionModel
from tests.helpers.distillers import make_features
from tests.helpers.trainers import build_trainer
from train.build import DISTILLER_OPTIONS, build_student
from train.callbacks import STEPS_WATCHED
from train.config import PRESETS
from train.distillation.distiller import Distiller
from train.forward import add_encoder_forward, distil


RATE = 0.125
BIAS = {"balance_form": "bias", "balance_rate": RATE}
BY_TEACHER = {"expert_assignment": "teacher", "num_experts": 2}


def biases(folder: Path) -> torch.Tensor:
    weights = load_file(folder / "model.safetensors")
    return torch.stack([value for key, value in sorted(weights.items()) if "balance_bias" in key])


def test_the_bias_moves_once_a_step_and_is_saved_and_resumed(arguments, tmp_path: Path) -> None:
    """Not once a micro-batch, and not by an evaluation."""
    settings: dict[str, Any] = BIAS | {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    settings |= {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "no"}
    trainer = build_trainer(*arguments(**settings))
    trainer.train()
    assert trainer.args.lambda_balance == 0 and trainer.args.balance_rate == RATE
    for step in range(1, 4):
        moved = biases(tmp_path / "output" / f"checkpoint-{step}") / RATE
        assert torch.equal(moved, moved.round()) and 0 < moved.abs().max() <= step
    entry = next(entry for entry in trainer.state.log_history if "text" in entry)
    assert "balance" not in entry and sum(entry[f"experts/{i}"] for i in range(3)) == pytest.approx(1)

    router = trainer.model.model.vision_tower.encoder.layers[0].mlp.router
    before = router.balance_bias.clone()
    evaluated = trainer.evaluate(trainer.train_dataset.select(range(4)))
    assert torch.equal(router.balance_bias, before) and "eval_loss" in evaluated

    again = settings | {"output_dir": str(tmp_path / "output"), "overwrite_output_dir": False}
    resumed = build_trainer(*arguments(**again))
    resumed.train(resume_from_checkpoint=str(tmp_path / "output" / "checkpoint-1"))
    restored = resumed.model.model.vision_tower.encoder.layers[0].mlp.router.balance_bias
    assert torch.equal(restored, before)


def test_each_teacher_trains_its_expert_alone(arguments) -> None:
    """Also without a text loss, where the routed features train the routers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MoveKDVisionConfig(
        **sizes,
        image_size=20,
        patch_size=5,
        num_experts=3,
        lora_rank=2,
        lora_dropout=0.0,
        expert_init="kaiming",
        add_pooling_layer=False,
    )
    tower, pixels = MoveKDVisionModel(config), torch.randn(4, 3, 20, 20)
    teachers = {"clip": (16, (4, 4)), "eva": (10, (8, 8)), "sam": (24, (5, 5))}
    features = make_features(teachers=teachers)
    options = {name: PRESETS["student_heads"][name] for name in DISTILLER_OPTIONS}
    distiller = Distiller(16, (4, 4), teachers, **options | {"feature_normalization": "none", "head_form": "mlp"})
    with torch.no_grad():
        routed = tower(pixels, output_hidden_states=True)
    for vision in (None, routed):
        for index, name in enumerate(teachers):
            tower.zero_grad()
            distiller.clip_share = 1.0 if name == "clip" else 0.0
            output, returned = distil(tower, config, distiller, pixels, features, -1, "teacher", vision)
            # An own loss for each teacher, since the shares of the other two are equal
            alone = tower(pixels, experts=torch.full((4,), index)).last_hidden_state[:, 1:]
            expected = distiller(alone, features).teacher_losses[name]
            torch.testing.assert_close(output.teacher_losses[name], expected)
            output.loss.sum().backward()
            for key, parameter in tower.named_parameters():
                if "_experts" in key:
                    gradient = parameter.grad.transpose(0, -1) if key.endswith("weight_b") else parameter.grad
                    reached = gradient.reshape(3, -1).abs().amax(dim=1) > 0
                    assert reached.tolist() == ([True, False, False] if name == "clip" else [False, True, True])
                elif "router" in key:
                    assert (parameter.grad is not None and parameter.grad.any()) == (vision is None), key
            assert returned is vision or returned.router_probabilities

    kd = distil(tower, config, distiller, pixels, features, -1, "teacher")[0].loss
    tower.distiller = distiller
    add_encoder_forward(tower, "bias", "teacher")
    outputs = tower(pixels, image_weights=torch.ones(4), teacher_features=features)
    torch.testing.assert_close(outputs.kd, kd)
    assert outputs.balance is None and outputs.expert_tokens.sum(dim=1).tolist() == [64, 64]


def test_text_trains_routers_and_experts_and_distillation_the_experts(arguments, tmp_path: Path) -> None:
    """In both stages the shares in the log are the routers', and the next run keeps each teacher's expert."""
    trainer = build_trainer(*arguments(stage="pretrain", max_steps=STEPS_WATCHED + 1, **BY_TEACHER, **BIAS))
    trainer.train()  # the guard finds a gradient for every expert and router
    tower = trainer.model.model.vision_tower
    entries = [entry for entry in trainer.state.log_history if "kd/vit" in entry]
    patches = sum(entries[0][f"experts/{index}"] for index in range(2))
    assert patches == pytest.approx(1) and entries[-1]["kd"] < entries[0]["kd"]
    assert tower.config.expert_teachers == ["clip", "vit"]

    saved = {"model_name_or_path": str(tmp_path / "saved"), "chat_template": "own", **BY_TEACHER, **BIAS}
    trainer.save_model(saved["model_name_or_path"])
    trainer.processing_class.save_pretrained(saved["model_name_or_path"])
    make = arguments(**saved)
    model, _ = build_student(*make[1:])
    assert torch.equal(
        model.model.vision_tower.encoder.layers[0].mlp.router.balance_bias,
        tower.encoder.layers[0].mlp.router.balance_bias,
    )
    for change, message in (
        ({"teachers": make[1].teachers[::-1]}, "The teachers .'vit', 'clip'. are to have an expert each"),
        ({"balance_form": "pooled", "balance_rate": None}, "have a bias that balances them"),
    ):
        with pytest.raises(ValueError, match=message):
            build_student(*arguments(**saved | change)[1:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (BIAS | {"lambda_balance": 0.01}, "`lambda_balance` is 0.01 and `balance_rate` 0.125"),
        (BIAS | {"balance_rate": 0.0}, "moves by a positive rate"),
        ({"balance_rate": 0.001}, "'per_layer' moves no bias"),
        (BIAS | {"router_gradient": "none"}, "routers that learn from the other losses"),
        (BIAS | {"num_experts": 1}, "it needs two experts or more"),
        (BIAS | {"distill": False, "freeze_vision_tower": True}, "`freeze_vision_tower` True"),
        (BY_TEACHER | {"num_experts": 3}, "with `num_experts` 3 and 2 teachers"),
        (BY_TEACHER | {"distill": False}, "each expert learns from whole images by its teacher's loss"),
        (BY_TEACHER | {"router_gradient": "none"}, "'router_gradient': 'none'"),
        (BY_TEACHER | {"distill_tiles": "all", "image_aspect_ratio": "anyres"}, "'distill_tiles': 'all'"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        arguments(**options)
