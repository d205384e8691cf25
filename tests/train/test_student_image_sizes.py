"""`student_image_sizes`: a size of the student's image drawn for each step of stage `encoder`."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers.trainer_callback import TrainerCallback

from tests.helpers.trainers import SMALL_RUN
from train.arguments import ModelArguments
from train.build import build_distiller, build_teachers
from train.build_encoder import build_encoder
from train.config import MoveKDSFTConfig
from train.encoder_options import check_sizes_fit
from train.encoder_trainer import MoveKDEncoderTrainer
from train.forward import resize_images, split_summary, step_image_size
from train.teachers.features import FrozenTeacher


SIZES = [8, 12, 16]


def pixels(rows: list[dict[str, Any]], size: int) -> torch.Tensor:
    draw = [torch.Generator().manual_seed(row["images"]) for row in rows]
    return torch.stack([torch.randn(3, size, size, generator=generator) for generator in draw])


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    count = len(rows)
    batch = {"pixel_values": pixels(rows, 16), "image_weights": torch.ones(count), "image_rows": torch.arange(count)}
    teachers = {"clip": pixels(rows, 16), "vit": pixels(rows, 36)}
    return batch | {"teacher_pixel_values": teachers, "num_blank_images": 0, "bad_rows": []}


@pytest.fixture
def make_trainer(parts: dict[str, str], tmp_path: Path) -> Any:
    def make(**overrides: Any) -> MoveKDEncoderTrainer:
        settings = {
            "stage": "encoder",
            "vision_model": parts["clip"],
            "teachers": [{"name": name, "model": parts[name]} for name in ("clip", "vit")],
            "distillation_preset": "radio",
            "student_image_sizes": SIZES,
            "output_dir": str(tmp_path),
            "max_steps": 6,
            "save_strategy": "no",
            "lora_dropout": 0.0,
        }
        args = MoveKDSFTConfig(**SMALL_RUN | settings | overrides)
        model, _ = build_encoder(args, ModelArguments())
        teachers = build_teachers(args)
        distiller = build_distiller(args, model, teachers)
        sample = collate([{"images": index} for index in range(24)])["teacher_pixel_values"]
        if distiller.needs_statistics:
            distiller.fit_statistics([{name: teacher(sample[name]) for name, teacher in teachers.items()}])
        data = Dataset.from_dict({"images": list(range(48))})
        return MoveKDEncoderTrainer(model, args, teachers, distiller, train_dataset=data, data_collator=collate)

    return make


class SizesSeen(TrainerCallback):
    def __init__(self, model: torch.nn.Module) -> None:
        self.sizes: list[int] = []
        model.embeddings.register_forward_pre_hook(lambda module, inputs: self.sizes.append(inputs[0].shape[-1]))


def test_each_step_has_a_size_of_its_own_and_a_resumed_run_the_same(make_trainer, tmp_path: Path) -> None:
    expected = [step_image_size(SIZES, 42, step) for step in range(6)]
    assert len(set(expected)) > 1
    trainer = make_trainer(save_strategy="steps", save_steps=3)
    seen = SizesSeen(trainer.model)
    trainer.train()
    assert seen.sizes == expected
    assert all("kd/vit/summary" in logs for logs in trainer.state.log_history[:6])
    resumed = make_trainer(save_strategy="steps", save_steps=3)
    seen = SizesSeen(resumed.model)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert seen.sizes == expected[3:]


def test_a_step_in_a_smaller_size_written_out(make_trainer) -> None:
    trainer, batch = make_trainer(distillation_preset="eupe"), collate([{"images": 1}, {"images": 2}])
    model = trainer.model.eval()
    features = {name: teacher(batch["teacher_pixel_values"][name]) for name, teacher in trainer.teachers.items()}
    inputs = {"image_weights": torch.ones(2), "teacher_features": features}
    assert all(isinstance(teacher, FrozenTeacher) for teacher in trainer.teachers.values())
    small = model(batch["pixel_values"], student_image_size=8, **inputs)
    resized = resize_images(batch["pixel_values"], 8)
    hidden = model(resized, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states[-1]
    tokens, summary = split_summary(hidden, 1)
    assert tokens.shape == (2, 4, 32)
    output = model.distiller(tokens, features, student_summary=summary, student_grid=(2, 2))
    torch.testing.assert_close(small.kd, output.loss)
    whole = model(batch["pixel_values"], **inputs)
    torch.testing.assert_close(model(batch["pixel_values"], student_image_size=16, **inputs).kd, whole.kd)
    assert (whole.kd - small.kd).abs().min() > 1e-5


def test_sizes_are_drawn_evenly() -> None:
    counts = Counter(step_image_size(SIZES, 1, step) for step in range(3000))
    assert all(900 < counts[size] < 1100 for size in SIZES)
    assert [step_image_size(SIZES, 1, step) for step in range(20)] != [step_image_size(SIZES, 2, s) for s in range(20)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"student_image_sizes": [8, 10]}, r"is \[8, 10\]. Give multiples of the tower's patch size 4, below .* 16"),
        ({"student_image_sizes": [16, 20]}, "below its image size 16"),
        ({"student_image_sizes": [16]}, "multiples of the tower's patch size 4"),
        ({"student_image_sizes": [0, 8]}, "multiples of the tower's patch size 4"),
        ({"student_image_sizes": []}, "multiples of the tower's patch size 4"),
        ({"distillation_preset": "paper"}, "only heads on the student.*as the preset `radio` does"),
        ({"distillation_preset": "student_heads", "token_weighting": "cls_attention"}, "'token_weighting'"),
        ({"stage": "pretrain"}, "in stage 'pretrain' the projector would get another number of tokens"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make_trainer, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(**settings)


def test_the_towers_own_size_need_not_be_a_multiple_of_the_patch_size() -> None:
    check_sizes_fit([224, 384], image_size=384, patch_size=14)
    for sizes in ([], [384], [224, 380], [0, 384], [398]):
        with pytest.raises(ValueError, match="`student_image_sizes` is"):
            check_sizes_fit(sizes, image_size=384, patch_size=14)
