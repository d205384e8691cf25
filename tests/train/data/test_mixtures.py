"""Mixtures, validation rows, and streams."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset, DatasetDict, IterableDataset
from PIL import Image
from torch.utils.data import DataLoader
from trl import TrlParser

from tests.helpers.colored_rows import llava_rows
from tests.helpers.questions import asked, question, write_json
from train.arguments import DataArguments
from train.data.bad_rows import BadRows
from train.data.datasets import DataSource, data_sources, load_conversations, load_train_and_validation


def load(names: Any, seed: int = 0, evaluate: bool = False, bad_rows: BadRows | None = None, **settings: Any) -> Any:
    return load_train_and_validation(
        DataArguments(names, **settings), BadRows() if bad_rows is None else bad_rows, seed, evaluate
    )


@pytest.fixture
def three(tmp_path: Path) -> list[str]:
    return [write_json(tmp_path / f"{name}.json", name, count) for name, count in (("a", 30), ("b", 300), ("c", 90))]


def test_without_weights_one_behind_the_other(three: list[str]) -> None:
    train, validation = load(three)
    assert validation is None
    assert [asked(row) for row in train] == [
        f"{name} {index}" for name, count in (("a", 30), ("b", 300), ("c", 90)) for index in range(count)
    ]
    assert train["row_index"][:] == list(range(420)), "a key of its own for every row"
    assert train[35]["source"] == "b.json row 5"


def test_weights(three: list[str]) -> None:
    weighted = [{"name": name, "weight": weight} for name, weight in zip(three, (2, 7, 1), strict=True)]
    train, _ = load(weighted)
    order = [asked(row) for row in train]
    counts = Counter(text[0] for text in order)
    assert len(set(order)) == len(order), "no row comes twice"
    assert counts["a"] == 30, "the first to be used up ends it"
    assert counts["b"] / len(order) == pytest.approx(0.7, abs=0.1)
    assert counts["c"] / len(order) == pytest.approx(0.1, abs=0.06)
    assert [text for text in order if text[0] == "b"] == [f"b {index}" for index in range(counts["b"])]
    assert [asked(row) for row in load(weighted)[0]] == order, "the seed decides"
    assert [asked(row) for row in load(weighted, seed=1)[0]] != order
    assert train["row_index"][:] != sorted(train["row_index"][:])

    longest, _ = load(weighted, mixture_stopping_strategy="all_exhausted")
    counts = Counter(asked(row) for row in longest)
    assert len(counts) == 420 and counts["a 0"] > 1
    assert len(set(longest["row_index"][:])) == 420


@pytest.mark.parametrize(
    ("weights", "message"),
    [((1, None), r"\[1, None\]. Give every data set"), ((1, 0), r"\[1, 0\]"), ((1, -2), r"\[1, -2\]")],
)
def test_weights_that_are_none(three: list[str], weights: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load([{"name": name, "weight": weight} for name, weight in zip(three, weights, strict=False)])


def test_a_misspelt_key_is_refused(three: list[str]) -> None:
    with pytest.raises(ValueError, match=r"the keys \['name', 'wieght'\]"):
        load([{"name": three[0], "wieght": 2}])
    with pytest.raises(ValueError, match="the keys"):
        load([{"weight": 2}])


def test_every_form_in_one_mixture(tmp_path: Path) -> None:
    """LLaVA files with an image folder, Parquet with stored pictures, TRL rows, text alone."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "images" / "x.png")
    (tmp_path / "llava.json").write_text(
        json.dumps([question("On disk?", "x.png", id="1"), question("Text?", id="2")])
    )
    Dataset.from_list(llava_rows(3)).to_parquet(tmp_path / "stored.parquet")
    messages = [{"role": "user", "content": "As messages?"}, {"role": "assistant", "content": "Yes."}]
    trl = Dataset.from_list([{"messages": messages, "images": [Image.new("RGB", (2, 2))]}])
    DatasetDict(train=trl, held=trl).save_to_disk(tmp_path / "trl")
    train, _ = load(
        [
            {"name": str(tmp_path / "llava.json"), "image_folder": str(tmp_path / "images")},
            str(tmp_path / "stored.parquet"),
            {"name": str(tmp_path / "trl"), "split": "held"},
        ]
    )
    assert [asked(row) for row in train] == ["On disk?", "Text?", *["What colour is it?"] * 3, "As messages?"]
    assert [len(row["images"]) for row in train] == [1, 0, 1, 1, 1, 1]
    assert train[5]["source"] == "trl (held) row 0"


@pytest.mark.parametrize("streaming", [False, True])
def test_bad_rows_of_data_sets_of_one_name_are_told_apart(tmp_path: Path, streaming: bool) -> None:
    rows = [question(f"Number {index}") for index in range(10)]
    rows[3] = {"conversations": []}
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.json").write_text(json.dumps(rows))
        (tmp_path / "subsets" / folder).mkdir(parents=True)
        Dataset.from_list(rows).to_parquet(tmp_path / "subsets" / folder / "train.parquet")
    subsets = [{"config_name": folder, "data_files": f"{folder}/*.parquet"} for folder in ("a", "b")]
    (tmp_path / "subsets" / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': subsets})}---\n")
    names = [str(tmp_path / folder / "train.json") for folder in ("a", "b")]
    names += [{"name": str(tmp_path / "subsets"), "subset": folder} for folder in ("a", "b")]
    bad_rows = BadRows(max_share=0.2)
    train, _ = load(names, bad_rows=bad_rows, streaming=streaming, shuffle_buffer_size=0)
    expected = ["train.json (data set 1)", "train.json (data set 2)", "subsets (a)", "subsets (b)"]
    if streaming:
        bad_rows.total = 40
        bad_rows.add((row["source"], row["problem"]) for row in islice(train, 40) if row["problem"])
    assert list(bad_rows.reasons) == [f"{name} row 3" for name in expected]


def test_a_data_set_that_is_named_twice_is_split_alike(three: list[str]) -> None:
    train, validation = load([three[1], three[1]], evaluate=True, validation_share=0.2)
    assert len(validation) == 2 * len({asked(row) for row in validation})
    assert not {asked(row) for row in train} & {asked(row) for row in validation}


def test_names_in_recipes_and_on_the_command_line(tmp_path: Path) -> None:
    def parse(*arguments: str) -> list[DataSource]:
        (data_args,) = TrlParser((DataArguments,)).parse_args_and_config(list(arguments))
        return data_sources(data_args)

    config = tmp_path / "recipe.yaml"
    for names, expected in (
        ("a.json", [DataSource("a.json", split="train")]),
        (["a.json", "b"], [DataSource("a.json", split="train"), DataSource("b", split="train")]),
        ({"name": "a.json", "image_folder": "x"}, [DataSource("a.json", image_folder="x", split="train")]),
        (
            [{"name": "a", "weight": 2, "subset": "s"}, {"name": "b", "weight": 0.5, "split": "t"}],
            [DataSource("a", 2, subset="s", split="train"), DataSource("b", 0.5, split="t")],
        ),
    ):
        config.write_text(yaml.safe_dump({"dataset_name": names}))
        assert parse("--config", str(config)) == expected
    assert parse("--config", str(config), "--dataset_name", "c.json") == [DataSource("c.json", split="train")]
    assert [source.name for source in parse("--dataset_name", "a.json", "b.json")] == ["a.json", "b.json"]
    folders = parse("--dataset_name", "a", "b", "--image_folder", "images")
    assert [source.image_folder for source in folders] == ["images", "images"]


# Rows held back


def test_validation_rows_are_held_back(three: list[str]) -> None:
    train, validation = load(three, evaluate=True, validation_share=0.2)
    seen, held = ({asked(row) for row in rows} for rows in (train, validation))
    assert not seen & held and len(seen) + len(held) == 420
    assert len(held) == pytest.approx(84, abs=25)
    again = load(three, evaluate=True, validation_share=0.2)
    assert [asked(row) for row in again[1]] == [asked(row) for row in validation]
    assert {asked(row) for row in load(three, 1, True, validation_share=0.2)[1]} != held
    # Neither the company of a row nor a repetition by weight changes its side
    assert {asked(row) for row in load(three[1:], evaluate=True, validation_share=0.2)[1]} == {
        text for text in held if text[0] != "a"
    }
    weighted = [{"name": name, "weight": 1} for name in three]
    settings = {"validation_share": 0.2, "mixture_stopping_strategy": "all_exhausted"}
    repeated, validation = load(weighted, evaluate=True, **settings)
    assert {asked(row) for row in validation} == held and {asked(row) for row in repeated} == seen
    # More held back: none comes back to the training rows
    assert held < {asked(row) for row in load(three, evaluate=True, validation_share=0.3)[1]}


def test_a_test_split_is_loaded_for_evaluation_alone(tmp_path: Path) -> None:
    parts = {
        name: Dataset.from_list([question(f"{name} {index}") for index in range(5)]) for name in ("train", "test")
    }
    DatasetDict(parts).save_to_disk(tmp_path / "splits")
    bad_rows = BadRows()
    train, validation = load(str(tmp_path / "splits"), evaluate=True, bad_rows=bad_rows)
    assert asked(train[0]) == "train 0" and asked(validation[0]) == "test 0" and bad_rows.total == 10
    assert not set(train["row_index"][:]) & set(validation["row_index"][:])
    assert load(str(tmp_path / "splits"))[1] is None


def test_shares_that_cannot_be_split(tmp_path: Path, three: list[str]) -> None:
    with pytest.raises(ValueError, match="validation_share is 0.1, but eval_strategy is 'no'"):
        load(three, validation_share=0.1)
    with pytest.raises(ValueError, match="`validation_share` is 1.0. Set it to 0 or more, and below 1"):
        load(three, validation_share=1.0)
    few = write_json(tmp_path / "few.json", "few", 2)
    with pytest.raises(ValueError, match="validation_share 0.001 of 2 rows holds back 0"):
        load(few, evaluate=True, validation_share=0.001)
    with pytest.raises(ValueError, match="has no splits"):
        load(three, evaluate=True)


# Streams


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` sleeps five seconds after each use of its reading threads, against a crash at a process's end."""
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.05)


@pytest.fixture
def shards(tmp_path: Path) -> str:
    """A folder of three Parquet files with pictures, the second of which holds a row without turns."""
    rows = llava_rows(24, text_only=(3, 4))
    for index, row in enumerate(rows):
        row["conversations"][0]["value"] += f" {index}"
        row["id"] = f"colour-{index}"
    rows[10]["conversations"] = []
    (tmp_path / "shards").mkdir()
    for number in range(3):
        part = Dataset.from_list(rows[8 * number : 8 * number + 8])
        part.to_parquet(tmp_path / "shards" / f"train-{number}.parquet")
    return str(tmp_path / "shards")


def numbers(rows: Any) -> list[int]:
    return [int(asked(row).split()[-1]) for row in rows if row["problem"] is None]


def test_a_stream_gives_the_rows_of_the_data_set(shards: str) -> None:
    stream = load_conversations(shards, streaming=True)
    assert isinstance(stream, IterableDataset)
    rows = list(stream)
    assert [row["problem"] for row in rows if row["problem"]] == ["'conversations' is not a list of turns"]
    whole = load_conversations(shards, max_bad_row_share=0.1)
    for row, expected in zip([row for row in rows if row["problem"] is None], whole, strict=True):
        for name in ("messages", "images", "modality_length"):
            assert row[name] == expected[name]
    assert rows[10]["source"].startswith("shards row ") and rows[10]["source"].endswith("of its shard (id colour-10)")
    assert len({row["source"] for row in rows}) == 24


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_stream_in_loader_workers(shards: str, num_workers: int) -> None:
    """Each worker counts the rows of its shards from zero; what a report calls them must differ nevertheless."""
    loader = DataLoader(load_conversations(shards, streaming=True), 2, num_workers=num_workers, collate_fn=list)
    rows = [row for batch in loader for row in batch]
    assert sorted(numbers(rows)) == [index for index in range(24) if index != 10]
    assert len({row["source"] for row in rows}) == 24


def test_a_training_stream_never_ends_and_is_shuffled(shards: str, quick: None) -> None:
    settings = {"streaming": True, "shuffle_buffer_size": 8}
    orders = [numbers(islice(load(shards, seed=seed, **settings)[0], 72)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    for start in (0, 23, 46):
        assert sorted(orders[0][start : start + 23]) == [*range(10), *range(11, 24)], "every row once in a pass"
    assert orders[0][:23] != sorted(orders[0][:23])
    assert numbers(islice(load(shards, streaming=True, shuffle_buffer_size=0)[0], 24)) == [*range(10), *range(11, 24)]


def test_validation_rows_of_a_stream(shards: str, quick: None) -> None:
    settings = {"streaming": True, "shuffle_buffer_size": 8, "validation_share": 0.3}
    train, validation = load(shards, evaluate=True, **settings)
    held = numbers(validation)
    assert set(held) | set(numbers(islice(train, 100))) == set(range(24)) - {10}
    assert 0 < len(held) == len(set(held)) and not set(held) & set(numbers(islice(train, 100)))
    assert validation.num_shards == 1, "pieces would be dealt to the processes unevenly"
    assert numbers(load(shards, evaluate=True, **settings)[1]) == held


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet", "saved", "list", "dataset"])
def test_every_source_can_be_streamed(tmp_path: Path, kind: str) -> None:
    rows = [question(f"Number {index}", id=index) for index in range(6)]
    path: Any = tmp_path / f"data.{kind}"
    if kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif kind == "parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif kind == "saved":
        Dataset.from_list(rows).save_to_disk(path)
    else:
        path = rows if kind == "list" else Dataset.from_list(rows)
    stream = load_conversations(path, streaming=True)
    assert isinstance(stream, IterableDataset) and numbers(stream) == list(range(6))
    assert [row["row_index"] for row in stream] == list(range(6))


def test_streams_mix_by_weight(three: list[str]) -> None:
    weighted = [{"name": name, "weight": weight} for name, weight in zip(three, (2, 7, 1), strict=True)]
    train, _ = load(weighted, streaming=True)
    counts = Counter(asked(row)[0] for row in islice(train, 100))
    assert counts["b"] == pytest.approx(70, abs=15)


@pytest.mark.parametrize("buffer_size", [0, 8])
def test_each_data_set_of_a_weighted_stream_is_repeated_by_itself(three: list[str], buffer_size: int) -> None:
    weighted = [{"name": name, "weight": 1} for name in three[:2]]
    train, _ = load(weighted, streaming=True, shuffle_buffer_size=buffer_size)
    rows = [asked(row) for row in islice(train, 600)]
    for letter, count in (("a", 30), ("b", 300)):
        own = [text for text in rows if text[0] == letter]
        assert len(own) == pytest.approx(300, abs=50)
        for start in range(0, len(own), count):
            one_pass = own[start : start + count]
            assert len(set(one_pass)) == len(one_pass), "no row twice before each has come once"
    assert [asked(row) for row in islice(train, 600)] == rows, "what a resumed run skips is what was trained on"


def test_an_empty_stream_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("\n")
    for streaming in (True, False):
        with pytest.raises(ValueError, match="has no row|No row is left of 0"):
            load_conversations(tmp_path / "data.jsonl", streaming=streaming)
