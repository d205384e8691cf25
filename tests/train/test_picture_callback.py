"""Pictures during training: they show the training images, are files and logged, and do not change training."""

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from modeling_movekd import MoveKDForConditionalGeneration
from modeling_movekd.inference import load_checkpoint
from modeling_movekd.visualization_movekd import relational_distance
from tests.helpers.colored_rows import llava_rows
from tests.helpers.launched import DDP_CPU, ROOT, SCRIPT, launch, write_settings
from train import run as stage_run
from train.callbacks import PictureCallback, check_pictures


ZERO2_CPU = (
    *("--config_file", ROOT / "train" / "accelerate" / "zero2.yaml", "--num_processes", "2"),
    *("--mixed_precision", "no", "--main_process_port", "0"),
)
STEMS = [
    "cls-attention",
    "components",
    "components-clip",
    "components-vit",
    "distance-clip",
    "distance-vit",
    "experts",
]


def pictures_of(folder: Path) -> dict[str, np.ndarray]:
    return {path.stem: np.array(Image.open(path)) for path in sorted(folder.glob("*.png"))}


def close_to(picture: np.ndarray, expected: np.ndarray, tolerance: int = 1) -> None:
    assert picture.shape == expected.shape
    assert np.abs(picture.astype(int) - expected).max() <= tolerance


def history(trainer: Any) -> list[dict[str, float]]:
    changing = ("runtime", "per_second", "num_tokens")
    return [
        {name: value for name, value in entry.items() if not name.endswith(changing)}
        for entry in trainer.state.log_history
    ]


def test_pictures_are_of_what_is_trained_on_and_change_nothing(
    arguments, dataset_folder, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    common = {"activation_checkpointing": True, "lora_dropout": 0.3, "max_steps": 4, "learning_rate": 0.02}
    plain = stage_run.train(*arguments(output_dir=str(tmp_path / "plain"), **common))
    settings = {"visualize_steps": 2, "visualize_images": 3, "report_to": ["tensorboard"]}
    drawn = stage_run.train(*arguments(output_dir=str(tmp_path / "drawn"), **settings, **common))
    # Training does not change, dropout included
    assert history(plain) == history(drawn) and len(history(plain)) >= 4
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("plain", "drawn")]
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())
    assert not (tmp_path / "plain" / "pictures").exists()

    folders = tmp_path / "drawn" / "pictures"
    assert sorted(path.name for path in folders.iterdir()) == ["step-0", "step-2", "step-4"]
    before, after = (pictures_of(folders / f"step-{step}") for step in (0, 4))
    assert sorted(after) == sorted(f"{number:02d}-{stem}" for number in (1, 2, 3) for stem in ("image", *STEMS))
    for number in (1, 2, 3):
        assert np.array_equal(before[f"{number:02d}-image"], after[f"{number:02d}-image"]), "the same images each time"

    # The last pictures show what the saved student makes of the first images of the data
    model, processor = load_checkpoint(tmp_path / "drawn", fold=False)
    rows = Dataset.load_from_disk(dataset_folder)
    images = [row["image"].convert("RGB") for row in rows.select(range(3))]
    pixels = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
    expected = model.visualize(pixels)
    clip = drawn.teachers["clip"](pixels).tokens
    distances = relational_distance(expected.tokens, clip)
    for index in range(3):
        of_image = {stem: after[f"{index + 1:02d}-{stem}"] for stem in ("image", *STEMS)}
        assert of_image["image"].shape == of_image["components"].shape == (336, 336, 3)
        assert np.array_equal(of_image["image"][10::21, 10::21], expected.image[index].numpy())
        assert np.array_equal(of_image["experts"][10:336:21, 10::21], expected.experts[index].numpy())
        shown = model.visualize(pixels, other_tokens={"clip": clip}, smallest_side=336)
        close_to(of_image["cls-attention"], shown.cls_attention[index].numpy())
        close_to(of_image["distance-clip"], shown.others["clip"].distance[index].numpy())
    assert distances.mean() > 0.01, "the student has moved away from CLIP"
    # Before the first step the student is CLIP: the distance is zero and the colors are equal
    dark = before["01-distance-clip"].astype(int) - (0.4 * before["01-image"]).astype(int)
    assert np.abs(dark - dark[0, 0]).max() <= 2
    close_to(before["01-components-clip"], before["01-components"])

    # TensorBoard has the same pictures as the folder
    (events,) = (tmp_path / "drawn").rglob("events.out.tfevents*")
    log = EventAccumulator(str(events), size_guidance={"images": 0}).Reload()
    assert sorted(log.Tags()["images"]) == sorted(
        f"pictures/{stem}/{number}" for stem in STEMS for number in (1, 2, 3)
    )
    for stem in STEMS:
        shown = log.Images(f"pictures/{stem}/2")
        assert [event.step for event in shown] == [0, 2, 4]
        image = np.array(Image.open(io.BytesIO(shown[-1].encoded_image_string)))
        assert np.array_equal(image, after[f"02-{stem}"])
    assert "train/text" in log.Tags()["scalars"]


@pytest.mark.parametrize("form", ["anyres", "tiles", "released"])
def test_the_whole_image_is_drawn(arguments, mixed, form: str) -> None:
    """Rows with no, one or several images: the first tile is drawn, and no blank image of a text-only row."""
    settings = {
        "anyres": {"image_aspect_ratio": "anyres"},
        "tiles": {"image_aspect_ratio": "anyres", "distill_tiles": "all"},
        "released": {"distillation_preset": "released"},
    }[form]
    settings |= {
        "dataset_name": mixed,
        "max_length": None,
        "max_steps": 1,
        "visualize_steps": 1,
        "visualize_images": 5,
    }
    trainer = stage_run.train(*arguments(**settings))
    callback = next(each for each in trainer.callback_handler.callbacks if isinstance(each, PictureCallback))
    # Rows 4 (two images), 6, 7 and 8 are the first with any
    rows = [trainer.train_dataset[index] for index in range(9)]
    rows = [row for row in rows if row["images"]]
    assert [len(row["images"]) for row in rows] == [2, 1, 1, 1]
    model, processor = load_checkpoint(trainer.args.output_dir)
    images = [Image.open(io.BytesIO(image["bytes"])).convert("RGB") for row in rows for image in row["images"]]
    pixels = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
    pixels = pixels if pixels.dim() == 4 else pixels[:, 0]
    torch.testing.assert_close(callback.pixels, pixels)
    if form != "released":
        clip = trainer.teachers["clip"](pixels).tokens
        torch.testing.assert_close(callback.teacher_tokens["clip"], clip, atol=1e-5, rtol=1e-4)
    files = pictures_of(Path(trainer.args.output_dir) / "pictures" / "step-1")
    assert len(files) == 5 * (1 + len(STEMS))
    layer = -2 if form == "released" else -1
    assert model.config.vision_feature_layer == layer
    expected = model.visualize(pixels, layer)
    for index in range(5):
        drawn = files[f"{index + 1:02d}-experts"][10:336:21, 10::21]
        assert np.array_equal(drawn, expected.experts[index].numpy())


def test_an_image_that_cannot_be_read_is_passed_over(arguments, tmp_path) -> None:
    """The black image in place of an unreadable image is not drawn."""
    rows = llava_rows(8)
    for index, row in enumerate(rows):
        file = io.BytesIO()
        row["image"].save(file, "PNG")
        row["image"] = {"bytes": file.getvalue()[: 60 if index == 0 else None], "path": None}
    Dataset.from_list(rows).save_to_disk(tmp_path / "rows")
    data_args, args, model_args = arguments(
        dataset_name=str(tmp_path / "rows"), max_steps=1, visualize_steps=1, visualize_images=2
    )
    data_args.max_bad_row_share = 0.5
    trainer = stage_run.train(data_args, args, model_args)
    images = [Image.open(io.BytesIO(row["image"]["bytes"])) for row in rows[1:3]]
    pixels = trainer.processing_class.image_processor(images=images, return_tensors="pt")["pixel_values"]
    callback = next(each for each in trainer.callback_handler.callbacks if isinstance(each, PictureCallback))
    torch.testing.assert_close(callback.pixels, pixels)


def test_cached_features_give_the_same_pictures(arguments, cached, mixed, tmp_path) -> None:
    settings = {"visualize_steps": 1, "visualize_images": 2, "max_steps": 1, "learning_rate": 0.0}
    stage_run.train(*cached(output_dir=str(tmp_path / "cached"), **settings))
    stage_run.train(*arguments(dataset_name=mixed, max_length=None, output_dir=str(tmp_path / "live"), **settings))
    one, other = (pictures_of(tmp_path / name / "pictures" / "step-0") for name in ("cached", "live"))
    assert one.keys() == other.keys() and len(one) == 2 * (1 + len(STEMS))
    for name, picture in one.items():
        close_to(picture, other[name], tolerance=3)


def test_evaluation_images_come_first_and_a_resumed_run_draws_on(arguments, dataset_folder, tmp_path) -> None:
    common = {"visualize_steps": 2, "visualize_images": 1, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    common |= {"eval_strategy": "steps", "eval_steps": 4, "teachers": [], "distill": False, "num_experts": 0}

    def make(**overrides: Any):
        data_args, args, model_args = arguments(**common, **overrides)
        data_args.validation_share = 0.25
        return data_args, args, model_args

    trainer = stage_run.train(*make())
    folder = Path(trainer.args.output_dir)
    assert sorted(path.name for path in (folder / "pictures").iterdir()) == ["step-0", "step-2", "step-4"]
    files = pictures_of(folder / "pictures" / "step-4")
    assert sorted(files) == ["01-cls-attention", "01-components", "01-image"], "no experts and no teachers"
    first = Image.open(io.BytesIO(trainer.eval_dataset[0]["images"][0]["bytes"])).convert("RGB")
    pixels = trainer.processing_class.image_processor(images=[first], return_tensors="pt")["pixel_values"]
    expected = MoveKDForConditionalGeneration.from_pretrained(folder).visualize(pixels)
    assert np.array_equal(files["01-image"][10::21, 10::21], expected.image[0].numpy())
    straight = pictures_of(folder / "pictures" / "step-4")
    (folder / "pictures" / "step-0" / "kept").write_text("")
    (folder / "pictures" / "step-4" / "old").write_text("")
    stage_run.train(*make(resume_from_checkpoint=str(folder / "checkpoint-2")))
    assert (folder / "pictures" / "step-0" / "kept").is_file()
    assert not (folder / "pictures" / "step-4" / "old").exists()
    resumed = pictures_of(folder / "pictures" / "step-4")
    assert all(np.array_equal(straight[name], resumed[name]) for name in straight), "colors included"


def test_refusals(arguments, tmp_path, monkeypatch) -> None:
    for wrong in ({"visualize_steps": -1}, {"visualize_steps": 5, "visualize_images": 0}):
        with pytest.raises(ValueError, match="give steps from 1, or 0 for no pictures, and at least one image"):
            stage_run.train(*arguments(**wrong))
    Dataset.from_list(llava_rows(8, text_only=tuple(range(8)))).save_to_disk(tmp_path / "words")
    with pytest.raises(ValueError, match="the data has no image to draw. Set it to 0"):
        stage_run.train(*arguments(dataset_name=str(tmp_path / "words"), visualize_steps=1, max_steps=1))
    for stage, refused in ((2, False), (3, True)):
        deepspeed = HfDeepSpeedConfig({"zero_optimization": {"stage": stage}})
        args = SimpleNamespace(
            visualize_steps=1, visualize_images=1, deepspeed_plugin=SimpleNamespace(hf_ds_config=deepspeed)
        )
        if refused:
            with pytest.raises(ValueError, match="under ZeRO-3 no process holds the whole tower to draw. Set it to 0"):
                check_pictures(args)
            args.visualize_steps = 0
        check_pictures(args)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="under FSDP no process holds the whole tower to draw"):
        stage_run.train(*arguments(visualize_steps=1))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ddp", "zero2"])
def test_one_of_two_processes_draws(backend: str, parts, dataset_folder, tmp_path, monkeypatch) -> None:
    """The weights are those of a run without pictures, and Trackio has the pictures."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    flags = {"ddp": DDP_CPU, "zero2": ZERO2_CPU}[backend]
    drawing = {"visualize_steps": 2, "visualize_images": 2, "report_to": ["trackio"], "project": "movekd"}
    configs = [
        write_settings(tmp_path / name, parts, dataset_folder, lora_dropout=0.1, **settings)
        for name, settings in {"plain": {}, "drawn": drawing}.items()
    ]
    result = launch(SCRIPT, *configs, launcher=flags)
    assert result.returncode == 0, result.stdout[-6000:]
    facts = {
        (name, rank): json.loads((tmp_path / name / f"facts-{rank}.json").read_text())
        for name in ("plain", "drawn")
        for rank in (0, 1)
    }
    assert len({each["weights"] for each in facts.values()}) == 1
    assert {each["world_size"] for each in facts.values()} == {2}
    assert {each["zero_stage"] for each in facts.values()} == {2 if backend == "zero2" else None}
    folders = tmp_path / "drawn" / "pictures"
    assert sorted(path.name for path in folders.iterdir()) == ["step-0", "step-2", "step-4"]
    files = [pictures_of(folder) for folder in sorted(folders.iterdir())]
    logged = [np.array(Image.open(path).convert("RGB")) for path in (tmp_path / "trackio").rglob("*.png")]
    assert len(logged) == 3 * 2 * len(STEMS)
    for of_step in files:
        for name, picture in of_step.items():
            if not name.endswith("-image"):
                assert any(np.array_equal(picture, other) for other in logged), name
