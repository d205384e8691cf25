import io
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from modeling_movekd.images import decode_image
from train.data.datasets import load_conversations


def picture(red: int = 200) -> PILImage.Image:
    return PILImage.new("RGB", (6, 4), (red, 30, 90))


def turns(*values: str, first: str = "human") -> list[dict[str, str]]:
    names = ["human", "gpt"] if first == "human" else ["gpt", "human"]
    return [{"from": names[number % 2], "value": value} for number, value in enumerate(values)]


def said(*texts: str) -> list[dict]:
    roles = ("user", "assistant")
    return [{"role": roles[number % 2], "content": text} for number, text in enumerate(texts)]


GOOD = {"conversations": turns("Hi", "Hello.")}


def read_one(row: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
    (converted,) = load_conversations([row], max_bad_row_share=0, **kwargs)
    return converted


def short(messages: list[dict[str, Any]]) -> list[tuple[str, int, str]]:
    """Role, number of images in front, and text of each message."""
    result = []
    for message in messages:
        kinds = [part["type"] for part in message["content"]]
        images = kinds.count("image")
        assert kinds[images:] in ([], ["text"])
        result.append((message["role"], images, message["content"][-1]["text"] if kinds[images:] else ""))
    return result


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("<image>\nWhat?", "What?"),
        ("What?\n<image>", "What?"),
        ("Look at <image> here", "Look at  here"),
        ("  <image>   a  b \n", "a  b"),
        ("<image> compare with <image> now", "compare with  now"),
        ("<image>", ""),
        ("<image>\n\tcafé ☕\u3000", "café ☕"),
    ],
)
def test_an_image_moves_to_the_front_of_its_turn(value: str, text: str) -> None:
    row = read_one({"image": picture(), "conversations": turns(value, " Yes \n")})
    assert short(row["messages"]) == [("user", 1, text), ("assistant", 0, " Yes \n")]


def test_several_images() -> None:
    images = [picture(red) for red in (10, 20, 30)]
    row = read_one({"image": images, "conversations": turns("<image><image>\nCompare", "Ok", "and <image>?", "Ok")})
    assert short(row["messages"]) == [
        ("user", 2, "Compare"),
        ("assistant", 0, "Ok"),
        ("user", 1, "and ?"),
        ("assistant", 0, "Ok"),
    ]
    assert [decode_image(image).getpixel((0, 0))[0] for image in row["images"]] == [10, 20, 30]


def test_text_only_rows_keep_their_text() -> None:
    row = read_one({"conversations": turns("  two  spaces ", "\nYes ")})
    assert short(row["messages"]) == [("user", 0, "  two  spaces "), ("assistant", 0, "\nYes ")]
    assert row["images"] == [] and row["modality_length"] == -3


def test_a_leading_answer_is_dropped_and_a_system_turn_kept() -> None:
    row = read_one({"conversations": turns("Welcome!", "Hi", "Hello.", first="gpt")})
    assert short(row["messages"]) == [("user", 0, "Hi"), ("assistant", 0, "Hello.")]
    assert row["modality_length"] == -3
    row = read_one({"conversations": [{"from": "system", "value": "Be brief."}, *turns("Hi", "Hello.")]})
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"conversations": turns("<image>\nWhat?", "Yes")}, "1 image placeholders for 0 images"),
        ({"image": picture(), "conversations": turns("What?", "Yes")}, "0 image placeholders for 1 images"),
        ({"image": picture(), "conversations": turns("<image> a", "b", "<image> c", "d")}, "2 image placeholders"),
        ({"image": [picture()] * 2, "conversations": turns("<image> a", "b")}, "1 image placeholders for 2 images"),
        ({"conversations": []}, "not a list of turns"),
        ({"conversations": "Hi"}, "not a list of turns"),
        ({"conversations": [{"from": "human"}, {"from": "gpt", "value": "b"}]}, "without a text in 'value'"),
        ({"conversations": [{"value": "a"}, {"from": "gpt", "value": "b"}]}, "without 'from'"),
        ({"conversations": [{"from": "bing", "value": "a"}]}, "unknown 'from' 'bing'"),
        ({"conversations": turns("a", "b", "c")}, "wrong order of roles"),
        ({"conversations": turns("a", first="gpt")}, "wrong order of roles"),
        ({"conversations": [*turns("a", "b"), *turns("c", first="gpt")]}, "wrong order of roles"),
        (
            {"id": "1"},
            r"its fields ['id'] have neither 'conversations' nor 'messages' nor another known format. Rows may",
        ),
        ({"text": "no image"}, "'texts' of 'user' and 'assistant' (FineVision, The Cauldron); an image with a 'text'"),
        ({"image": picture(), "texts": "a"}, "'texts' is not a list of 'user' and 'assistant'"),
        ({"image": picture(), "texts": [{"user": "a"}]}, "'texts'[0]['assistant'] is a NoneType, expected a text"),
        (
            {"image": picture(), "conversations": turns("a", "an <image>")},
            "[1], of role 'assistant', contains <image>",
        ),
        (
            {"image": picture(), "messages": said("a", "an <image>")},
            "message 1, of role 'assistant', contains <image>",
        ),
        ({"messages": [{"role": "system", "content": "<image>"}, *said("a", "b")]}, "of role 'system', contains"),
        ({"conversations": turns("a", "", "b", " ")}, "every answer is empty"),
        ({"image": picture(), "text": ""}, "every answer is empty"),
        ({"image": "", "conversations": turns("<image>", "b")}, "an empty image path"),
        ({"image": {"bytes": None, "path": None}, "conversations": turns("<image>", "b")}, "neither bytes nor path"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "without a role among"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "a content part that is neither"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}, "belong in 'images'"),
        (
            {"prompt": [{"role": "assistant", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
            "answers inside 'prompt'",
        ),
    ],
)
def test_bad_rows_are_skipped_and_reported(row: dict, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        dataset = load_conversations([GOOD, row, GOOD], max_bad_row_share=0.5)
    assert dataset["row_index"][:] == [0, 2]
    assert "1 of 3 rows cannot be used" in caplog.text and "row 1: " in caplog.text and reason in caplog.text
    with pytest.raises(ValueError, match="1 of 3 rows.*raise max_bad_row_share"):
        load_conversations([GOOD, row, GOOD], max_bad_row_share=0.3)


def test_a_share_of_bad_rows_stops() -> None:
    rows = [GOOD] * 97 + [{"conversations": []}] * 3
    assert len(load_conversations(rows, max_bad_row_share=0.03)) == 97
    with pytest.raises(ValueError, match=r"3 of 100 rows cannot be used \(3.00%\). First: row 97: .*; row 99: "):
        load_conversations(rows)
    with pytest.raises(ValueError, match="No row is left of 1"):
        load_conversations([{"conversations": []}], max_bad_row_share=1)
    with pytest.raises(ValueError, match="is 5. Set it to a share between 0 and 1"):
        load_conversations(rows, max_bad_row_share=5)


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "Yes"}]},
        {"messages": [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "Yes"}]},
        {
            "messages": [
                {"role": "user", "content": [text("What?"), {"type": "image"}]},
                {"role": "assistant", "content": [text("Yes")]},
            ]
        },
        {"prompt": "What?", "completion": "Yes"},
        {
            "prompt": [{"role": "user", "content": [{"type": "image"}, text("What?")]}],
            "completion": [{"role": "assistant", "content": "Yes"}],
        },
    ],
)
def test_trl_rows(row: dict[str, Any]) -> None:
    converted = read_one(row | {"images": [picture()]})
    assert short(converted["messages"]) == [("user", 1, "What?"), ("assistant", 0, "Yes")]
    assert len(converted["images"]) == 1 and converted["modality_length"] > 0


def test_trl_rows_without_images() -> None:
    row = {"messages": [{"role": "user", "content": " Hi"}, {"role": "assistant", "content": "Yes"}], "images": []}
    assert short(read_one(row)["messages"]) == [("user", 0, " Hi"), ("assistant", 0, "Yes")]


def llava_rows() -> list[dict[str, Any]]:
    return [
        {"id": 7, "image": "a/one.png", "conversations": turns("<image>\nWhat?", "Red.")},
        {"id": "text", "conversations": turns("Hi", "Hello.")},
        {"id": "x", "image": ["two.png", "a/one.png"], "conversations": turns("<image> <image>", "Both.")},
    ]


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    (tmp_path / "images" / "a").mkdir(parents=True)
    picture(10).save(tmp_path / "images" / "a" / "one.png")
    picture(20).save(tmp_path / "images" / "two.png")
    return tmp_path / "images"


def write_json(path: Path) -> None:
    path.write_text(json.dumps(llava_rows()), encoding="utf-8")


def write_json_lines(path: Path) -> None:
    path.write_text("\n".join(json.dumps(row) for row in llava_rows()), encoding="utf-8")


@pytest.mark.parametrize(("name", "write"), [("data.json", write_json), ("data.jsonl", write_json_lines)])
def test_llava_file_and_image_folder(
    tmp_path: Path, image_folder: Path, name: str, write: Callable[[Path], None]
) -> None:
    write(tmp_path / name)
    dataset = load_conversations(tmp_path / name, image_folder, max_bad_row_share=0)
    assert dataset.column_names == ["messages", "images", "row_index", "source", "modality_length"]
    reds = [[decode_image(image).getpixel((0, 0))[0] for image in images] for images in dataset["images"]]
    assert reds == [[10], [], [20, 10]]
    # Nothing but the path is stored: files are opened when a batch is made.
    assert all(image["bytes"] is None for images in dataset["images"] for image in images)


def test_images_lie_beside_a_llava_file_by_default(tmp_path: Path, image_folder: Path) -> None:
    write_json(image_folder / "data.json")
    dataset = load_conversations(str(image_folder / "data.json"))
    assert decode_image(dataset[0]["images"][0]).getpixel((0, 0))[0] == 10


@pytest.mark.parametrize("path", ["../secret.png", "a/../../secret.png", "/etc/secret.png", "../images_too/x.png"])
def test_a_path_out_of_the_image_folder_is_refused(image_folder: Path, path: str) -> None:
    row = {"image": path, "conversations": turns("<image>", "Yes")}
    with pytest.raises(ValueError, match="Row 1: the image path .* leads out of the image folder"):
        load_conversations([GOOD, row], image_folder, max_bad_row_share=1)
    with pytest.raises(ValueError, match="Row 0 names the image file .*: give the image_folder"):
        load_conversations([row])


def datasets_of_pictures(tmp_path: Path) -> Dataset:
    rows = [
        {"image": picture(10), "conversations": turns("<image>\nWhat?", "Red."), "family": "colour"},
        {"image": None, "conversations": turns("Hi", "Hello."), "family": "none"},
    ]
    turn = {"from": Value("string"), "value": Value("string")}
    features = Features({"image": Image(), "conversations": List(turn), "family": Value("string")})
    return Dataset.from_list(rows, features)


def as_is(dataset: Dataset, path: Path) -> Dataset:
    return dataset


def as_parquet(dataset: Dataset, path: Path) -> Path:
    dataset.to_parquet(str(path / "data.parquet"))
    return path / "data.parquet"


def as_parquet_folder(dataset: Dataset, path: Path) -> Path:
    (path / "folder").mkdir()
    dataset.to_parquet(str(path / "folder" / "train-00000-of-00001.parquet"))
    return path / "folder"


def as_saved_folder(dataset: Dataset, path: Path) -> Path:
    dataset.save_to_disk(str(path / "saved"))
    return path / "saved"


@pytest.mark.parametrize("form", [as_is, as_parquet, as_parquet_folder, as_saved_folder])
def test_datasets_with_pictures(
    tmp_path: Path, form: Callable[[Dataset, Path], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = form(datasets_of_pictures(tmp_path), tmp_path)
    # A file of the stored picture's name in the working folder must not be taken for it.
    monkeypatch.chdir(tmp_path)
    dataset = load_conversations(source, max_bad_row_share=0)
    assert [short(messages)[0] for messages in dataset["messages"]] == [("user", 1, "What?"), ("user", 0, "Hi")]
    assert isinstance(dataset[0]["images"][0]["bytes"], bytes)
    assert decode_image(dataset[0]["images"][0]).getpixel((0, 0)) == (10, 30, 90)
    assert dataset[1]["images"] == [] and dataset["modality_length"][:] == [3, -2]


def test_stored_bytes_win_over_a_file_of_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    picture(99).save(tmp_path / "one.png")
    buffer = io.BytesIO()
    picture(10).save(buffer, format="PNG")
    row = {"image": {"bytes": buffer.getvalue(), "path": "one.png"}, "conversations": turns("<image>", "Red.")}
    assert decode_image(read_one(row)["images"][0]).getpixel((0, 0))[0] == 10


def test_a_broken_image_is_kept_until_it_is_needed() -> None:
    row = {"image": {"bytes": b"not a picture", "path": None}, "conversations": turns("<image>", "Red.")}
    dataset = load_conversations([GOOD, row])
    assert len(dataset) == 2
    with pytest.raises(ValueError, match="not an image of a known format"):
        decode_image(dataset[1]["images"][0])


def test_datasets_are_checked_too() -> None:
    dataset = datasets_of_pictures(Path()).map(lambda row: {"image": None})
    with pytest.raises(ValueError, match="1 of 2 rows cannot be used.*row 0: 1 image placeholders for 0 images"):
        load_conversations(dataset)


def test_unknown_sources(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There is no file"):
        load_conversations(tmp_path / "missing.json")
    (tmp_path / "data.csv").write_text("a,b")
    with pytest.raises(ValueError, match="Cannot read .*data.csv"):
        load_conversations(tmp_path / "data.csv")
    (tmp_path / "data.json").write_text('{"conversations": []}')
    with pytest.raises(ValueError, match="holds a JSON dict, expected a list"):
        load_conversations(tmp_path / "data.json")


def placed(dataset: Any, row: int = 0, message: int = 0) -> list[str]:
    """The parts of a message, an image as `<image>`."""
    return [part["text"] or "<image>" for part in dataset[row]["messages"][message]["content"]]


@pytest.mark.parametrize("roles", [("user", "assistant"), ("human", "gpt"), ("human", "assistant")])
def test_share_gpt_names(roles: tuple[str, str]) -> None:
    values = ("<image>\nWhat?", "Yes")
    by_from = [{"from": role, "value": value} for role, value in zip(roles, values, strict=True)]
    expected = load_conversations([{"image": picture(), "conversations": turns(*values)}])["messages"][:]
    assert load_conversations([{"image": picture(), "conversations": by_from}])["messages"][:] == expected
    rows = [{"image": picture(), "conversations": said(*values)}]
    assert load_conversations(rows)["messages"][:] == expected


@pytest.mark.parametrize("columns", [False, True])
def test_fine_vision_rows(columns: bool) -> None:
    texts: Any = [{"user": "What?", "assistant": "A cat.", "source": "x"}, {"user": "Sure?", "assistant": "Yes."}]
    if columns:
        texts = {"user": ["What?", "Sure?"], "assistant": ["A cat.", "Yes."]}
    dataset = load_conversations([{"images": [picture(), picture()], "texts": texts}, {"images": [], "texts": texts}])
    assert [message["role"] for message in dataset[0]["messages"]] == ["user", "assistant"] * 2
    assert placed(dataset) == ["<image>", "<image>", "What?"] and placed(dataset, message=3) == ["Yes."]
    assert placed(dataset, row=1) == ["What?"] and dataset[1]["images"] == []


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_images_with_captions(tmp_path: Path, streaming: bool) -> None:
    for number in range(3):
        (tmp_path / "captioned" / "sub").mkdir(parents=True, exist_ok=True)
        picture(number).save(tmp_path / "captioned" / "sub" / f"{number}.png")
    lines = [f"sub/{number}.png,picture {number}" for number in range(3)]
    (tmp_path / "captioned" / "metadata.csv").write_text("\n".join(["file_name,text", *lines]), encoding="utf-8")
    rows = list(load_conversations(tmp_path / "captioned", streaming=streaming))
    assert [row["messages"][1]["content"][0]["text"] for row in rows] == [f"picture {number}" for number in range(3)]
    assert [part["type"] for part in rows[0]["messages"][0]["content"]] == ["image"]
    assert decode_image(rows[2]["images"][0]).tobytes() == picture(2).tobytes()


def test_several_images_keep_their_places_and_one_comes_first() -> None:
    several = "Image 1: <image> Image 2: <image>\nWhat differs?"
    image, text = {"type": "image"}, lambda value: {"type": "text", "text": value}
    parts = [text("Image 1:"), image, text("Image 2:"), image, text("What differs?")]
    rows = [
        {"image": [picture()] * 2, "conversations": turns(several, "Color.")},
        {"images": [picture()] * 2, "messages": [{"role": "user", "content": parts}, *said("", "Color.")[1:]]},
    ]
    dataset = load_conversations(rows)
    for row in range(2):
        assert placed(dataset, row) == ["Image 1:", "<image>", "Image 2:", "<image>", "What differs?"]
    glued = [{"role": "user", "content": [text("First."), image, text("Second.")]}, *said("", "Yes.")[1:]]
    assert placed(load_conversations([{"images": [picture()], "messages": glued}])) == ["<image>", "First.\nSecond."]
