"""Images without text: what is read from each kind of source, and what a batch of them holds."""

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from PIL import Image
from transformers import CLIPImageProcessorPil

from train.arguments import DataArguments
from train.data.bad_rows import BadRows
from train.data.datasets import load_train_and_validation
from train.data.image_collator import ImageCollator
from train.teachers.preprocessing import TeacherPreprocessor


SIZE = 16


def picture(seed: int = 0, width: int = 30, height: int = 20) -> Image.Image:
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def png(seed: int = 0) -> bytes:
    file = io.BytesIO()
    picture(seed).save(file, "PNG")
    return file.getvalue()


def folder_of_images(folder: Path, names: list[str]) -> Path:
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(seed))
    return folder


def load(*names: Any, evaluate: bool = False, bad_rows: BadRows | None = None, **settings: Any) -> Any:
    arguments = DataArguments(dataset_name=list(names), **{"shuffle_buffer_size": 0} | settings)
    return load_train_and_validation(arguments, bad_rows or BadRows(), evaluate=evaluate, images_only=True)


def shown(rows: Any, number: int | None = None) -> list[str]:
    """The name of each row, and of its image file."""
    found = []
    for row, _ in zip(rows, range(len(rows) if number is None else number), strict=False):
        (image,) = row["images"]
        found.append(f"{row['source']}: {os.path.basename(image['path']) if image['path'] else len(image['bytes'])}")
    return found


@pytest.mark.parametrize("streaming", [False, True])
def test_every_image_of_a_folder(tmp_path: Path, streaming: bool) -> None:
    folder = folder_of_images(tmp_path / "data", ["b.PNG", "cats/1.jpg", "cats/deep/2.webp", "train/3.png"])
    (folder / "cats" / "labels.txt").write_text("no image")
    (folder / "metadata.csv").write_text("file_name,text\nb.PNG,a caption\n")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "4.png").write_bytes(png())
    (folder / "cats" / "again").symlink_to(folder)
    rows, _ = load(folder, streaming=streaming)
    names = ["b.PNG", "1.jpg", "2.webp", "3.png"]
    assert shown(rows, 4) == [f"data row {number}: {name}" for number, name in enumerate(names)]
    first = next(iter(rows))
    assert list(first) == ["images", "row_index", "source"] + ["problem"] * streaming


def test_splits_of_a_folder(tmp_path: Path) -> None:
    folder = folder_of_images(tmp_path / "data", ["train/cats/1.png", "train/dogs/2.png", "test/3.png"])
    train, held_back = load(folder, evaluate=True)
    assert [len(train), len(held_back)] == [2, 1]
    with pytest.raises(ValueError, match=r"has the splits \['test', 'train'\], not 'validation'"):
        load(folder, dataset_train_split="validation")
    with pytest.raises(ValueError, match="set validation_share"):
        load(folder / "train", evaluate=True)


def test_a_folder_without_images(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match=r"has no image among 1 files. Images end with one of .*\.png"):
        load(tmp_path)


def as_parquet(rows: Dataset, path: Path) -> Path:
    path.mkdir()
    rows.to_parquet(path / "part.parquet")
    (path / "preview.png").write_bytes(png())
    return path


def as_saved_folder(rows: Dataset, path: Path) -> Path:
    DatasetDict({"train": rows}).save_to_disk(path)
    return path


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("column", ["image", "jpg"])
@pytest.mark.parametrize("stored", [as_parquet, as_saved_folder])
def test_data_sets_with_an_image_column(tmp_path: Path, stored: Any, column: str, streaming: bool) -> None:
    rows = [{column: picture(seed), "label": seed, "text": "ignored"} for seed in range(3)]
    loaded, _ = load(stored(Dataset.from_list(rows), tmp_path / "data"), streaming=streaming)
    assert [len(row["images"]) for row, _ in zip(loaded, range(3), strict=False)] == [1, 1, 1]
    assert "messages" not in next(iter(loaded))


def test_it_must_be_clear_which_column_holds_images(tmp_path: Path) -> None:
    Dataset.from_list([{"left": picture(), "right": picture()}]).to_parquet(tmp_path / "two.parquet")
    with pytest.raises(ValueError, match=r"\['left', 'right'\] hold images. Rename the column"):
        load(tmp_path / "two.parquet")
    Dataset.from_list([{"text": "a"}]).to_parquet(tmp_path / "none.parquet")
    with pytest.raises(ValueError, match="of which none hold images"):
        load(tmp_path / "none.parquet")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_conversations_give_their_images(
    tmp_path: Path, kind: str, streaming: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Each image of a row once; text alone is no bad row, an empty path is."""
    rows = [{"image": "0.png", "conversations": []}, {"text": "alone"}, {"images": ["1.png", "2.png"]}, {"image": ""}]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / f"d.{kind}").write_text("\n".join(lines) if kind == "jsonl" else f"[{','.join(lines)}]")
    bad_rows = BadRows(max_share=1)
    loaded, _ = load(tmp_path / f"d.{kind}", streaming=streaming, bad_rows=bad_rows)
    kept = [row for row, _ in zip(loaded, range(4), strict=False) if not row.get("problem")]
    assert shown(kept) == [f"d.{kind} row {name}.png" for name in ("0: 0", "2 image 0: 1", "2 image 1: 2")]
    if not streaming:
        assert [row["row_index"] for row in kept] == [0, 1, 2]
        assert list(bad_rows.reasons.values()) == ["'image'[0] is an empty image path"]
        assert "1 of 4 rows have no image" in caplog.text


@pytest.mark.parametrize("streaming", [False, True])
def test_mixtures_and_held_back_images(tmp_path: Path, streaming: bool) -> None:
    folders = [folder_of_images(tmp_path / name, [f"{n}.png" for n in range(30)]) for name in "ab"]
    mixture = [{"name": str(folder), "weight": weight} for folder, weight in zip(folders, (3, 1), strict=True)]
    train, held_back = load(*mixture, evaluate=True, validation_share=0.2, streaming=streaming)
    seen, evaluated = shown(train, 20), {row["source"] for row in held_back}
    assert 10 < sum(name.startswith("a ") for name in seen) < 20
    assert evaluated and not evaluated & {name.split(":")[0] for name in seen}


# Batches


def collator(**settings: Any) -> ImageCollator:
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}, resample=Image.Resampling.BICUBIC
    )
    teachers = {"first": TeacherPreprocessor(20, (0.5,) * 3, (0.5,) * 3)}
    return ImageCollator(processor, teachers, **settings)


def test_a_bad_image_is_black_and_weighs_nothing(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(png()[:200])
    rows = [
        {"images": [{"bytes": png(1), "path": None}], "row_index": 7, "source": "d row 7"},
        {"images": [{"bytes": None, "path": str(tmp_path / "broken.png")}], "row_index": 8, "source": "d row 8"},
        {"images": [], "row_index": 9, "source": "d row 9", "problem": "no JSON"},
    ]
    batch = collator()(rows)
    assert batch["pixel_values"].shape == (3, 3, SIZE, SIZE) and batch["pixel_values"].dtype == torch.float32
    assert batch["teacher_pixel_values"]["first"].shape == (3, 3, 20, 20)
    assert batch["image_weights"].tolist() == [1, 0, 0] and batch["num_blank_images"] == 0
    assert batch["image_rows"].tolist() == [0, 1, 2]
    assert not batch["teacher_pixel_values"]["first"][1:].any()
    (broken, reason), malformed = batch["bad_rows"]
    assert broken == "d row 8" and "broken.png: an image that cannot be decoded" in reason
    assert malformed == ("d row 9", "no JSON")


def test_teachers_see_the_square_that_the_student_sees() -> None:
    image = picture(2)
    square = image.crop((5, 0, 25, 20))
    batch = collator()([{"images": [image]}])
    teacher = collator().teacher_preprocessors["first"]
    assert torch.equal(batch["teacher_pixel_values"]["first"], teacher.resize([square]))
    # Resized before it is cut, so that pixels at the left and right edge differ
    cut_before = collator()([{"images": [square]}])["pixel_values"]
    torch.testing.assert_close(batch["pixel_values"][..., 3:-3], cut_before[..., 3:-3])
    assert collator().teacher_geometry["crop"] == "center_square"
