"""What is opened of a data set and when, and what is said of files that are not as they should be."""

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from PIL import Image

from tests.helpers.colored_rows import llava_rows
from tests.helpers.questions import asked, question, write_json
from train.data.conversations import STAND_IN
from train.data.datasets import load_conversations


# Opening nothing before it is needed


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every file that Python or Pillow opens from here on."""
    names: list[str] = []
    original_open, original_image_open = builtins.open, Image.open

    def noting_open(file: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(str(file))
        return original_open(file, *args, **kwargs)

    def noting_image_open(file: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(str(file))
        return original_image_open(file, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", noting_open)
    monkeypatch.setattr(Image, "open", noting_image_open)
    return names


def test_fifty_thousand_rows_start_without_an_image(tmp_path: Path, opened: list[str]) -> None:
    """One picture is there, the others are missing: neither makes a difference until a batch asks."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "images" / "0.png")
    opened.clear()
    rows = [question(f"What is {index}?", f"{index}.png", id=index) for index in range(50_000)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    dataset = load_conversations(tmp_path / "data.json", tmp_path / "images", max_bad_row_share=0)
    assert len(dataset) == 50_000
    assert dataset[49_999]["images"] == [{"bytes": None, "path": str(tmp_path / "images" / "49999.png")}]
    assert dataset[49_999]["source"] == "data.json row 49999"
    stream = load_conversations(tmp_path / "data.json", tmp_path / "images", streaming=True)
    assert next(iter(stream))["images"][0]["path"].endswith("0.png")
    assert not [name for name in opened if name.endswith(".png")]


def test_stored_pictures_are_not_decoded(tmp_path: Path, opened: list[str]) -> None:
    Dataset.from_list(llava_rows(20)).to_parquet(tmp_path / "data.parquet")
    opened.clear()
    assert len(load_conversations(tmp_path / "data.parquet")) == 20
    assert len(list(load_conversations(tmp_path / "data.parquet", streaming=True))) == 20
    assert not [name for name in opened if "BytesIO" in name]


# Image folders


def test_links_inside_the_image_folder_are_followed(tmp_path: Path) -> None:
    """The check is of the path as the data writes it; links are the folder's owner's."""
    for name in ("elsewhere", "images"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "elsewhere" / "x.png")
    (tmp_path / "images" / "coco").symlink_to(tmp_path / "elsewhere")
    (row,) = load_conversations([question("What?", "coco/x.png")], tmp_path / "images")
    assert Image.open(row["images"][0]["path"]).size == (4, 4)
    with pytest.raises(ValueError, match="Row 0: the image path 'coco/../../elsewhere/x.png' leads out of"):
        load_conversations([question("What?", "coco/../../elsewhere/x.png")], tmp_path / "images")


@pytest.mark.parametrize("path", ["/etc/hostname", "../x.png"])
def test_paths_in_place_of_stored_bytes_stay_in_the_folder_too(tmp_path: Path, path: str) -> None:
    row = question("What?", "x") | {"image": {"bytes": None, "path": path}}
    with pytest.raises(ValueError, match="leads out of the image folder"):
        load_conversations([row], tmp_path)
    with pytest.raises(ValueError, match="Row 0 names the image file .*give the image_folder"):
        load_conversations([row])
    Dataset.from_list([row]).to_parquet(tmp_path / "data.parquet")
    with pytest.raises(ValueError, match=r"data\.parquet row 0 names the image file"):
        load_conversations(tmp_path / "data.parquet")


def test_a_missing_image_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There is no image folder .*nowhere"):
        load_conversations([question("Hi")], tmp_path / "nowhere")


# What is wrong, and where


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"id": 1, "conversations": []}, {"id": 2, "conversations": [}]', "in row 1, field 'conversations'"),
        ('[{"id": 1}\n{"id": 2}]', "in row 1: Expecting ',' delimiter: line 2 column 1"),
        ('[{"id": 1}, {"id": 2}, {"image": "a.png", "conver', "in row 2, field 'image'"),
        ("[", "in row 0"),
        ("hello", "in row 0"),
    ],
)
def test_json_errors_name_row_and_field(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(ValueError, match=r"data\.json is not valid JSON " + message):
        load_conversations(tmp_path / "data.json")


def test_json_of_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_bytes('[{"id": "é"}]'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"data\.json is not UTF-8 at byte 9"):
        load_conversations(tmp_path / "data.json")
    (tmp_path / "data.json").write_text(json.dumps([question("Hi")]), encoding="utf-8-sig")
    assert len(load_conversations(tmp_path / "data.json")) == 1


@pytest.mark.parametrize("streaming", [False, True])
def test_bad_lines_count_as_bad_rows(tmp_path: Path, streaming: bool) -> None:
    lines = [json.dumps(question(f"Number {index}")) for index in range(4)]
    lines[1] = lines[1].replace('"value"', '"value', 1)
    lines.insert(3, "  ")
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    rows = list(load_conversations(tmp_path / "data.jsonl", max_bad_row_share=0.25, streaming=streaming))
    if streaming:
        bad = rows.pop(1)
        assert bad["source"] == "data.jsonl row 1" and "not valid JSON in field 'from': " in bad["problem"]
        assert bad["messages"] == STAND_IN and bad["images"] == []
    assert [asked(row) for row in rows] == ["Number 0", "Number 2", "Number 3"]
    assert [row["row_index"] for row in rows] == [0, 2, 3]
    if not streaming:
        with pytest.raises(ValueError, match=r"data\.jsonl row 1: not valid JSON in field 'from'"):
            load_conversations(tmp_path / "data.jsonl")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": 3}]}, r"'conversations'\[1\]"),
        ({"conversations": [{"from": "human", "value": "Hi"}, "Hello"]}, r"'conversations'\[1\] is a str"),
        ({"conversations": [{"from": ["human"], "value": "Hi"}]}, r"'conversations'\[0\] has an unknown 'from'"),
        (
            {"conversations": [{"from": "human", "value": "\ud83d"}]},
            r"'conversations'\[0\]\['value'\] holds half a ch",
        ),
        ({"image": ["a.png", 7]}, r"'image'\[1\] is an image of type int"),
        ({"image": "\ud83d.png"}, r"'image'\[0\] holds half a character"),
        (
            {"conversations": None, "messages": [{"role": "user", "content": "a"}, {"role": "assistant"}]},
            "message 1 has",
        ),
    ],
)
def test_reasons_name_the_field(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    rows = [question("Hi"), question("Hi") | change]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=rf"1 of 2 rows cannot be used \(50.00%\). First: data.json row 1: {reason}"):
        load_conversations(tmp_path / "data.json")


@pytest.mark.parametrize("split", ["test", "validation"])
def test_a_file_without_splits_is_not_its_own_test_data(tmp_path: Path, split: str) -> None:
    dataset = Dataset.from_list([question("Hi")])
    dataset.save_to_disk(tmp_path / "saved")
    dataset.to_parquet(tmp_path / "data.parquet")
    for source in (
        write_json(tmp_path / "a.json", "a", 3),
        str(tmp_path / "saved"),
        str(tmp_path / "data.parquet"),
        dataset,
    ):
        with pytest.raises(ValueError, match=f"has no splits, so no '{split}'.*validation_share"):
            load_conversations(source, split=split)
    DatasetDict(train=dataset, test=dataset).save_to_disk(tmp_path / "splits")
    assert load_conversations(tmp_path / "splits", split="test")["source"][:] == ["splits (test) row 0"]
    with pytest.raises(ValueError, match=r"has the splits \['train', 'test'\], not 'dev'"):
        load_conversations(tmp_path / "splits", split="dev")
