"""Distillation on all tiles of `anyres`: the teachers see what the student sees, and each image counts once."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from modeling_movekd.images import decode_image
from tests.helpers.launched import DDP_CPU, SCRIPT, launch, run, write_settings
from tests.helpers.trainers import build_trainer
from train.build import build_student, build_teachers
from train.data.collator import MoveKDCollator
from train.data.image_collator import cut_tiles
from train.teachers.preprocessing import TeacherPreprocessor
from train.trainer import MoveKDTrainer


SIZE = 16
GRIDS = [[rows * SIZE, columns * SIZE] for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
# (width, height) and the tiles of its grid: 2, 2, 4, 3 and 3
SIZES = {(40, 20): 2, (11, 25): 2, (31, 30): 4, (20, 70): 3, (100, 9): 3}
ALL = {"image_aspect_ratio": "anyres", "distill_tiles": "all", "max_length": None}


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Colored blobs, the same at any resolution."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (5, 5, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy()).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def dataset_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Rows whose images differ in their number of tiles; every fifth has no image."""
    rows = []
    for index in range(20):
        size = list(SIZES)[index % len(SIZES)]
        image = None if index % 5 == 3 else picture(size, index)
        question = "What is it?" if image is None else "<image>\nWhat is it?"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": f"The picture {index}."}]
        rows.append({"image": image, "conversations": turns})
    folder = str(tmp_path_factory.mktemp("data") / "tiles")
    Dataset.from_list(rows).save_to_disk(folder)
    return folder


@pytest.mark.parametrize("factor", [1, 7])
@pytest.mark.parametrize("size", SIZES)
def test_tiles_are_the_students(size: tuple[int, int], factor: int) -> None:
    """An enlarged image has the student's very pixels; a larger one shows the same with more of them."""
    image = picture(size).resize((size[0] * factor, size[1] * factor), Image.Resampling.BICUBIC)
    processor = LlavaNextImageProcessorPil(
        image_grid_pinpoints=GRIDS, size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
    )
    student = processor(image, return_tensors="pt")["pixel_values"][0]
    tiles = cut_tiles(image, GRIDS, SIZE)
    assert len(tiles) + 1 == len(student) == image_size_to_num_patches((image.height, image.width), GRIDS, SIZE)
    assert factor > 1 or len(tiles) == SIZES[size]
    same_pixels = TeacherPreprocessor(SIZE, tuple(processor.image_mean), tuple(processor.image_std))
    seen = same_pixels(tiles)
    enlarged = all(tile.width == SIZE for tile in tiles)
    if enlarged:
        torch.testing.assert_close(seen, student[1:])
    else:
        # A tile keeps the resolution that the image has: no teacher gets less than there is
        assert factor == 7 or max(size) > 2 * SIZE
        assert all(tile.width == tile.height for tile in tiles)
        assert tiles[0].width * (student.shape[0] - 1) >= max(image.size)
        distances = (seen[:, None] - student[None, 1:]).abs().mean(dim=(2, 3, 4))
        assert distances.argmin(dim=1).tolist() == list(range(len(tiles)))
        # The margins lie on whole pixels, of which there are few here
        assert distances.diagonal().max() < (0.2 if factor == 1 else 0.1)


def test_collated_tiles(arguments) -> None:
    """One crop for each that the student gets, in its order, without the padding of the batch."""
    _, args, model_args = arguments(**ALL)
    _, processor = build_student(args, model_args)
    preprocessors = {name: teacher.preprocessor for name, teacher in build_teachers(args).items()}
    images = [picture(size, index) for index, size in enumerate(SIZES)]
    parts = [{"type": "image"}, {"type": "text", "text": "What?"}]
    reply = {"role": "assistant", "content": [{"type": "text", "text": "This."}]}
    rows = [{"messages": [{"role": "user", "content": parts}, reply], "images": [image]} for image in images]
    batch = MoveKDCollator(processor, preprocessors, distill_tiles="all")(rows)
    base = MoveKDCollator(processor, preprocessors)(rows)
    assert batch.keys() == base.keys()
    for name, preprocessor in preprocessors.items():
        crops = [crop for image in images for crop in (image, *cut_tiles(image, GRIDS, SIZE))]
        assert len(crops) == sum(SIZES.values()) + len(SIZES)
        assert torch.equal(batch["teacher_pixel_values"][name], preprocessor.resize(crops))
        assert torch.equal(base["teacher_pixel_values"][name], preprocessor.resize(images))
    # The clip teacher has the student's preprocessing, so it gets the student's pixels, the whole image included
    student = torch.cat(
        [pixels[: 1 + count] for pixels, count in zip(batch["pixel_values"], SIZES.values(), strict=True)]
    )
    taught = preprocessors["clip"].normalize(batch["teacher_pixel_values"]["clip"])
    distances = (student - taught).abs().mean(dim=(1, 2, 3))
    assert distances.max() < 0.2 and (distances < 1e-6).sum() >= len(SIZES)


def by_hand(trainer: MoveKDTrainer, rows: list[dict[str, Any]], distill_tiles: str) -> dict[str, torch.Tensor]:
    """The distillation terms of these rows, one crop after the other: mean over the crops, then over the images."""
    model, collator = trainer.model, trainer.data_collator
    terms = []
    for row in rows:
        if not row["images"]:
            continue
        image = decode_image(row["images"][0])
        pixels = collator.processor.image_processor(image, return_tensors="pt")["pixel_values"][0]
        crops = [image, *cut_tiles(image, GRIDS, SIZE)]
        assert len(crops) == len(pixels)
        of_image = []
        for crop, crop_pixels in list(zip(crops, pixels, strict=True))[: None if distill_tiles == "all" else 1]:
            tower = model.model.vision_tower(crop_pixels[None], output_hidden_states=True)
            tokens = tower.hidden_states[model.config.vision_feature_layer][:, 1:]
            features = {
                name: teacher(collator.teacher_preprocessors[name]([crop]))
                for name, teacher in trainer.teachers.items()
            }
            output = model.distiller(tokens, features)
            losses = {f"kd/{name}": value[0] for name, value in output.teacher_losses.items()}
            of_image.append({"kd": output.loss[0], **losses})
        terms.append({name: torch.stack([crop[name] for crop in of_image]).mean() for name in of_image[0]})
    return {name: torch.stack([image[name] for image in terms]).mean() for name in terms[0]}


@pytest.mark.parametrize("preset", ["paper", "student_heads"])
@pytest.mark.parametrize("distill_tiles", ["base", "all"])
def test_losses_and_gradient_are_those_by_hand(arguments, preset: str, distill_tiles: str) -> None:
    settings = arguments(
        **ALL | {"distill_tiles": distill_tiles},
        distillation_preset=preset,
        lora_dropout=0.0,
        lambda_balance=0.0,
        per_device_train_batch_size=5,
    )
    trainer = build_trainer(*settings)
    rows = [trainer.train_dataset[index] for index in range(5)]
    batch = trainer._prepare_inputs(trainer.data_collator(rows))
    counts = [image_size_to_num_patches(size, GRIDS, SIZE) for size in batch["image_sizes"]]
    assert len(set(counts)) == 3, "the batch holds images of different numbers of tiles"

    model = trainer.model.train()
    expected = by_hand(trainer, rows, distill_tiles)
    parameters = {
        name: value for name, value in model.named_parameters() if "vision_tower" in name or "distil" in name
    }
    wanted = torch.autograd.grad(expected["kd"], list(parameters.values()), allow_unused=True)

    def loss_of(lambda_kd: float) -> torch.Tensor:
        trainer.args.lambda_kd = lambda_kd
        return trainer.compute_loss(model, dict(batch))

    losses = {scale: loss_of(scale) for scale in (0.0, 1.0)}
    torch.testing.assert_close((losses[1.0] - losses[0.0]).detach(), expected["kd"].detach(), rtol=1e-4, atol=1e-5)
    for name, value in expected.items():
        assert trainer._metrics["train"][name][-1] == pytest.approx(value.item(), rel=1e-5), name
    found = torch.autograd.grad(losses[1.0] - losses[0.0], list(parameters.values()), allow_unused=True)
    for name, one, other in zip(parameters, found, wanted, strict=True):
        if other is None:
            assert one is None or not one.any(), name
        else:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6, msg=name)

    # Tiles that only fill the batch up are in no term, and every real one is
    padded = dict(batch)
    padded["pixel_values"] = batch["pixel_values"].clone()
    for pixels, count in zip(padded["pixel_values"], counts, strict=True):
        pixels[count:] = 1e3
    assert torch.equal(trainer.compute_loss(model, padded), losses[1.0])


def test_splitting_a_step_changes_nothing(arguments, tmp_path) -> None:
    """Two halves of a batch hold different numbers of images and of tiles."""
    same = {**ALL, "lora_dropout": 0.0, "max_steps": 2, "optim": "sgd", "lambda_kd": 1.0}
    same |= {"train_sampling_strategy": "sequential"}
    whole, halves = (
        build_trainer(*arguments(**same, per_device_train_batch_size=size, gradient_accumulation_steps=4 // size))
        for size in (4, 2)
    )
    for trainer in (whole, halves):
        trainer.train()
    entries = [[e for e in trainer.state.log_history if "kd" in e] for trainer in (whole, halves)]
    assert len(entries[0]) == len(entries[1]) == 2
    for one, other in zip(*entries, strict=True):
        for name in ("loss", "kd", "kd/clip", "kd/vit", "balance", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-5), name
    for (name, one), other in zip(whole.model.named_parameters(), halves.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, msg=name)


def test_text_alone_distils_nothing(arguments) -> None:
    trainer = build_trainer(*arguments(**ALL))
    batch = trainer.data_collator([trainer.train_dataset[3]])
    assert batch["num_blank_images"] == 1
    assert len(batch["teacher_pixel_values"]["clip"]) == image_size_to_num_patches((SIZE, SIZE), GRIDS, SIZE) > 1
    trainer.model.train()
    trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch)).backward()
    assert "kd" not in trainer._metrics["train"]
    assert not any(value.grad.any() for value in trainer.model.distiller.parameters())


def test_teachers_that_saw_other_crops_are_refused(arguments) -> None:
    """What the collator hands over and what the forward distils are held against each other."""
    trainer = build_trainer(*arguments(**ALL))
    collator = trainer.data_collator
    collator.distill_tiles = "base"
    batch = trainer._prepare_inputs(collator([trainer.train_dataset[index] for index in range(3)]))
    with pytest.raises(ValueError, match="saw 3 images, the student 11"):
        trainer.compute_loss(trainer.model.train(), batch)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_aspect_ratio": "pad"}, "'image_aspect_ratio': 'pad'"),
        ({"geometry": "per_teacher"}, "'geometry': 'per_teacher'"),
        ({"distill": False, "teachers": None}, "'distill': False"),
        ({"feature_cache": "somewhere"}, "'feature_cache': 'somewhere'"),
        ({"distill_tiles": "some"}, "`distill_tiles` is 'some'"),
    ],
)
def test_settings_that_would_distil_no_tiles_are_refused(arguments, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arguments(**ALL | settings)


def test_collator_refuses_what_has_no_tiles(arguments) -> None:
    """A student that is continued decides by itself how images are cut, whatever the arguments say."""
    _, processor = build_student(*arguments()[1:])
    with pytest.raises(ValueError, match="cuts no tiles"):
        MoveKDCollator(processor, distill_tiles="all")
    _, processor = build_student(*arguments(**ALL)[1:])
    with pytest.raises(ValueError, match="'per_teacher'"):
        MoveKDCollator(processor, distill_tiles="all", geometry="per_teacher")
    with pytest.raises(ValueError, match="'some'"):
        MoveKDCollator(processor, distill_tiles="some")


@pytest.mark.slow
def test_two_processes_give_what_one_gives(parts: dict[str, str], dataset_folder: str, tmp_path: Path) -> None:
    """Their batches differ in images and tiles, and one of them has none."""
    same = {**ALL, "lambda_kd": 1.0, "max_steps": 5, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
    same |= {"lr_scheduler_type": "constant", "train_sampling_strategy": "sequential"}
    both = write_settings(tmp_path / "both", parts, dataset_folder, per_device_train_batch_size=1, **same)
    finished = launch(SCRIPT, both, launcher=(*DDP_CPU, "--num_processes", "2", "--main_process_port", "0"))
    assert finished.returncode == 0, finished.stdout[-4000:]
    alone = run(write_settings(tmp_path / "alone", parts, dataset_folder, per_device_train_batch_size=2, **same))
    facts = [json.loads((tmp_path / "both" / f"facts-{rank}.json").read_text()) for rank in range(2)]
    assert [fact["world_size"] for fact in facts] == [2, 2]
    assert [fact["images"] for fact in facts] == [[1, 1, 1, 1, 0], [1, 0, 1, 1, 1]]
    entries = [
        [entry for entry in log if "text" in entry] for log in (facts[0]["log_history"], alone.state.log_history)
    ]
    assert len(entries[0]) == len(entries[1]) == 5
    for one, other in zip(*entries, strict=True):
        for name in ("loss", "kd", "kd/clip", "kd/vit", "balance", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-5), name
    weights = [load_file(tmp_path / kind / "model.safetensors") for kind in ("both", "alone")]
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-5, atol=1e-6, msg=name)
