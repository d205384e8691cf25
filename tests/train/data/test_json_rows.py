"""JSON files: read in blocks, converted once to Arrow, equal to Python's parser and to the conversion row by row."""

import json
import multiprocessing
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from train.data import json_rows
from train.data.bad_rows import BadRows
from train.data.conversations import FEATURES, convert_row
from train.data.datasets import load_conversations
from train.data.json_rows import read_rows
from train.data.plain_conversations import convert_rows


TEXTS = [
    "",
    " ",
    "a b",
    "<image>\nWhat?",
    "What? <image>",
    "<image>",
    "\ta\u2003b\n",
    "ö " * 9,
    '"}, {"id": "',
    "\x1c\x85.",
]
IMAGES = [
    "a.jpg",
    "a/b.jpg",
    "./a.jpg",
    "a//b.jpg",
    "a/../b.jpg",
    "a.b/.c",
    "a/",
    ".",
    "",
    7,
    ["a.jpg"],
    ["a.jpg", "b.jpg"],
]


def turn(rng: random.Random, number: int, has_image: bool) -> Any:
    speakers = ("human", "gpt") if rng.random() < 0.97 else ("gpt", "system", "robot", None, ["human"])
    fitting = [text for text in TEXTS if ("<image>" in text) == (has_image and number == 0)]
    value = rng.choice(fitting if rng.random() < 0.95 else [*TEXTS, None, 3])
    return {"from": speakers[number % len(speakers)], "value": value}


def random_row(rng: random.Random) -> Any:
    if rng.random() < 0.02:
        return rng.choice([None, 1, "text", [], {}])
    row: dict[str, Any] = {"id": rng.choice([1, "x"])}
    if rng.random() < 0.6:
        row[rng.choice(["image", "image", "images"])] = rng.choice(IMAGES[: 2 if rng.random() < 0.5 else None])
    count = rng.choice([2, 2, 4, 3, 1, 0])
    row["conversations"] = (
        [turn(rng, number, len(row) > 1) for number in range(count)] if rng.random() < 0.97 else {"from": "human"}
    )
    return row


def test_plain_rows_are_converted_as_the_others(tmp_path: Path) -> None:
    rng = random.Random(0)
    rows = [random_row(rng) for _ in range(6000)]
    expected = [convert_row(row, index, str(tmp_path), "x", 5) for index, row in enumerate(rows, 3)]
    usable = sum(row["problem"] is None for row in expected)
    assert 1000 < usable < 5000 and sum(len(row["images"]) == 1 for row in expected) > 500
    found = convert_rows(rows, 3, str(tmp_path), "x", 5)
    assert found.schema.equals(FEATURES.arrow_schema)
    assert found.to_pylist() == expected
    half = {"conversations": [{"from": "human", "value": "\ud800"}, {"from": "gpt", "value": "a"}]}
    problems = convert_rows([rows[0], half], 0, str(tmp_path), "", 0)["problem"].to_pylist()
    assert "holds half a character" in problems[1]


def test_a_path_out_of_the_folder(tmp_path: Path) -> None:
    row = {
        "image": "a/../../b.jpg",
        "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}],
    }
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    with pytest.raises(ValueError, match=r"Rows.json row 0|rows.json row 0: the image path .* leads out"):
        load_conversations(tmp_path / "rows.json")


@pytest.mark.parametrize("indent", [None, 2, "\t"])
@pytest.mark.parametrize("block", [1, 50, 1000])
def test_rows_of_blocks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, block: int, indent: Any) -> None:
    """With a field first that turns have too, and with separators inside texts."""
    monkeypatch.setattr(json_rows, "BLOCK", block)
    rng = random.Random(1)
    rows: list[Any] = [
        {"from": i, "turns": [{"from": rng.choice(TEXTS), "n": 1}] * rng.randint(0, 4)} for i in range(60)
    ]
    rows[30] = {"from": '"}, {"from": "', "number": float("inf"), "half": "\ud800", "large": 10**40}
    path = tmp_path / "rows.json"
    for text in (
        json.dumps(rows, indent=indent),
        json.dumps(rows, indent=indent, ensure_ascii=True) + " \n",
        "[]",
        " [ ] ",
    ):
        path.write_text(text)
        assert [row for found in read_rows(path) for row in found] == json.loads(text)
    path.write_text("\ufeff" + json.dumps([{"a": "ö"}] * 9, ensure_ascii=False), encoding="utf-8")
    assert [row for found in read_rows(path) for row in found] == [{"a": "ö"}] * 9
    lines = tmp_path / "rows.jsonl"
    lines.write_text("\n".join(map(json.dumps, rows)) + '\n\n{"a": 1},{"b": 2}\n')
    *found, last = [row for found in read_rows(lines) for row in found]
    assert found == rows and isinstance(last, ValueError)


def test_a_large_file_is_not_read_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = [{"id": i, "conversations": [{"id": 0, "from": "human"}] * 3} for i in range(20_000)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    monkeypatch.setattr(json_rows, "_read_whole", lambda path: pytest.fail("read whole"))
    found = list(read_rows(tmp_path / "rows.json"))
    assert [row for block in found for row in block] == rows
    assert len(found) > 1 and max(map(len, found)) < len(rows) * 0.9


ERRORS: list[tuple[Callable[[str], bytes], str]] = [
    (lambda text: text[:-1].encode(), "is not valid JSON in row 300|is not valid JSON in row 299"),
    (lambda text: (text + "]").encode(), "Extra data"),
    (lambda text: text.replace("}, {", "} {", 1).encode(), "is not valid JSON in row 0, field 'value'"),
    (lambda text: text.replace('"w 250"', '"w 250', 1).encode(), "is not valid JSON in row 250, field 'value'"),
    (lambda text: text.encode().replace(b"w 250", b"w \xff", 1), "is not UTF-8 at byte"),
    (lambda text: text.encode("utf-16"), "is not UTF-8"),
    (lambda text: b'{"a": 1}', "holds a JSON dict"),
    (lambda text: b"", "is not valid JSON"),
    (lambda text: b"[" * 200_000, "is nested too deeply"),
]


@pytest.mark.parametrize(("spoil", "message"), ERRORS)
def test_what_is_wrong_with_a_file(monkeypatch, tmp_path: Path, spoil: Callable[[str], bytes], message: str) -> None:
    monkeypatch.setattr(json_rows, "BLOCK", 4000)
    (tmp_path / "rows.json").write_bytes(spoil(json.dumps(plain(300))))
    with pytest.raises(ValueError, match=message):
        load_conversations(tmp_path / "rows.json")


def plain(count: int, word: str = "w") -> list[dict[str, Any]]:
    return [
        {"conversations": [{"from": "human", "value": "why?"}, {"from": "gpt", "value": f"{word} {i}"}]}
        for i in range(count)
    ]


def cached_files() -> set[Path]:
    return set(Path(os.environ["HF_DATASETS_CACHE"]).rglob("*.arrow"))


def load(path: Path, **options: Any) -> list[Any]:
    return list(load_conversations(path, **options))


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder)
    return folder


def test_a_file_is_converted_once(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    rows = [*plain(300), {"conversations": "none"}]
    path.write_text(json.dumps(rows))
    bad = BadRows(max_share=0.5)
    first = load_conversations(path, bad_rows=bad)
    written = {file: file.stat().st_mtime_ns for file in cached_files()}
    assert written and not list(cache.rglob("*incomplete"))
    assert {Path(file["filename"]) for file in first.cache_files} <= set(written)
    again = BadRows(max_share=0.5)
    assert list(load_conversations(path, bad_rows=again)) == list(first)
    assert {file: file.stat().st_mtime_ns for file in cached_files()} == written
    assert (
        (again.total, again.reasons)
        == (bad.total, bad.reasons)
        == (301, {"rows.json row 300": bad.reasons["rows.json row 300"]})
    )


def test_another_content_is_converted_again(cache: Path, tmp_path: Path) -> None:
    """Also of the same size, at the same time."""
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(plain(3, "a")))
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    old = load(path)
    path.write_text(json.dumps(plain(3, "b")))
    os.utime(path, ns=times)
    new = load(path)
    assert [row["messages"][1]["content"][0]["text"] for row in new] == ["b 0", "b 1", "b 2"] != old
    (tmp_path / "images").mkdir()
    shown = [
        {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}]}
    ]
    path.write_text(json.dumps(shown))
    for folder in (tmp_path, tmp_path / "images"):
        assert load(path, image_folder=folder)[0]["images"][0]["path"] == str(folder / "a.jpg")


def test_processes_that_start_at_once(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, plain(20_000))))
    with multiprocessing.get_context("fork").Pool(3) as pool:
        first, *others = pool.map(load, [path] * 3)
    assert len(first) == 20_000 and all(other == first for other in others)
    assert len(cached_files()) == 1


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    (tmp_path / "rows.json").write_text(json.dumps(plain(3)))
    with pytest.raises(OSError, match="cannot be converted in .*Set HF_DATASETS_CACHE to a folder"):
        load_conversations(tmp_path / "rows.json")


def test_an_error_leaves_nothing(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(plain(3))[:-1])
    with pytest.raises(ValueError, match="is not valid JSON"):
        load_conversations(tmp_path / "rows.json")
    assert not cached_files() and not list(cache.rglob("*incomplete"))
