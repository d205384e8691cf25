"""Rows that cannot be used: each counted once and listed in a file, and too many of them stop a run."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from tests.helpers.colored_rows import llava_rows
from tests.helpers.launched import DDP_CPU, SCRIPT, launch, write_settings
from train import run as stage_run
from train.data.bad_rows import BAD_ROWS_NAME, BadRows
from train.data.datasets import load_conversations


def listed(folder: Path) -> dict[str, str]:
    lines = (folder / BAD_ROWS_NAME).read_text(encoding="utf-8").splitlines()
    return {entry["row"]: entry["reason"] for entry in map(json.loads, lines)}


def test_each_row_counts_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad_rows = BadRows(tmp_path, max_share=0.02)
    bad_rows.total = 100
    with caplog.at_level(logging.WARNING):
        bad_rows.add([("row 3", "no such file"), ("row é", "\ud83d")])
        bad_rows.add([("row 3", "no such file")] * 5)
    assert (
        len(caplog.records) == 1 and "2 of 100 rows cannot be used" in caplog.text and "row 3: no such" in caplog.text
    )
    assert listed(tmp_path) == {"row 3": "no such file", "row é": "\ud83d"}
    with pytest.raises(
        ValueError, match=r"3 of 100 rows.*\(3.00%\).*bad_rows\.jsonl.*At most 2.00%.*max_bad_row_share"
    ):
        bad_rows.add([("row 7", "an image of 0 bytes")])
    assert "row 7" in listed(tmp_path), "the list is complete when the run stops"
    assert [path.name for path in tmp_path.iterdir()] == [BAD_ROWS_NAME]


def test_an_absolute_limit() -> None:
    bad_rows = BadRows(max_share=1, max_rows=2)
    bad_rows.total = 10
    bad_rows.add([("row 1", "x"), ("row 2", "x")])
    with pytest.raises(ValueError, match="At most 2 may be skipped: repair the data or raise max_bad_rows"):
        bad_rows.add([("row 3", "x")])
    strict = BadRows(max_share=1, max_rows=0)
    strict.total = 10
    strict.add([])
    with pytest.raises(ValueError, match="At most 0"):
        strict.add([("row 3", "x")])


def test_one_process_writes_and_a_resumed_run_goes_on(tmp_path: Path) -> None:
    silent = BadRows(tmp_path, max_share=1, writes=False)
    silent.total = 10
    silent.add([("row 1", "x")])
    assert not (tmp_path / BAD_ROWS_NAME).exists()
    first = BadRows(tmp_path, max_share=1)
    first.total = 10
    first.add([("row 1", "x")])
    resumed = BadRows(tmp_path, max_share=0.1, resume=True)
    resumed.total = 10
    resumed.add([("row 1", "x")])
    with pytest.raises(ValueError, match="2 of 10"):
        resumed.add([("row 2", "y")])
    assert set(listed(tmp_path)) == {"row 1", "row 2"}
    BadRows(tmp_path)
    assert not (tmp_path / BAD_ROWS_NAME).exists(), "of another run"


@pytest.mark.parametrize(("settings", "message"), [({"max_share": 1.5}, "is 1.5"), ({"max_rows": -1}, "is -1")])
def test_limits_that_are_none(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BadRows(**settings)


def test_reading_lists_them_too(tmp_path: Path) -> None:
    rows = [{"conversations": []}, *llava_rows(9)]
    with pytest.raises(ValueError, match="1 of 10"):
        load_conversations(rows, bad_rows=BadRows(tmp_path, max_share=0.05))
    assert listed(tmp_path) == {"row 0": "'conversations' is not a list of turns"}


# In training


@pytest.fixture
def spoiled(tmp_path: Path) -> Path:
    """A LLaVA file of 32 rows: one has lost its picture, of one it is empty, of one cut off; and one is malformed."""
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    rows = llava_rows(32)
    for index, row in enumerate(rows):
        row["image"].save(folder / "images" / f"{index}.png")
        row["image"] = f"images/{index}.png"
    (folder / "images" / "3.png").unlink()
    (folder / "images" / "10.png").write_bytes(b"")
    (folder / "images" / "20.png").write_bytes((folder / "images" / "20.png").read_bytes()[:300])
    del rows[30]["conversations"][1]["value"]
    (folder / "data.json").write_text(json.dumps(rows))
    return folder / "data.json"


REASONS = {
    "data.json row 3": "no such file",
    "data.json row 10": "an image of 0 bytes",
    "data.json row 20": "cannot be decoded",
    "data.json row 30": "without a text in 'value'",
}


def assert_all_listed(folder: Path) -> None:
    found = listed(folder)
    assert found.keys() == REASONS.keys()
    for row, reason in REASONS.items():
        assert reason in found[row]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("preset", ["paper", "student_heads"])
def test_training_goes_on_without_them(
    arguments, spoiled: Path, tmp_path: Path, num_workers: int, preset: str
) -> None:
    data_args, args, model_args = arguments(
        dataset_name=str(spoiled),
        max_steps=-1,
        num_train_epochs=2,
        dataloader_num_workers=num_workers,
        distillation_preset=preset,
    )
    data_args.max_bad_row_share = 0.125
    trainer = stage_run.train(data_args, args, model_args)
    assert trainer.state.global_step == 16
    assert_all_listed(tmp_path / "output")
    assert trainer.bad_rows.reasons.keys() == REASONS.keys() and trainer.bad_rows.total == 32
    assert all(torch.isfinite(value).all() for value in trainer.model.parameters())


@pytest.mark.parametrize(("share", "number"), [(0.1, None), (0.5, 3)])
def test_one_too_many_stops_the_run(
    arguments, spoiled: Path, tmp_path: Path, share: float, number: int | None
) -> None:
    data_args, args, model_args = arguments(dataset_name=str(spoiled), max_steps=-1, num_train_epochs=1)
    data_args.max_bad_row_share, data_args.max_bad_rows = share, number
    with pytest.raises(ValueError, match=r"4 of 32 rows cannot be used \(12.50%\).*output/bad_rows\.jsonl"):
        stage_run.train(data_args, args, model_args)
    assert_all_listed(tmp_path / "output")


def test_a_step_of_nothing_but_bad_rows(arguments, tmp_path: Path) -> None:
    """The second of three steps has no image and no label: the weights stay finite, and the others train."""
    rows = llava_rows(12)
    for row in rows[4:8]:
        row["image"] = {"bytes": b"broken", "path": None}
    path = tmp_path / "rows.jsonl"
    for index, row in enumerate(rows):
        if not isinstance(row["image"], dict):
            row["image"].save(tmp_path / f"{index}.png")
        row["image"] = f"{index}.png"
    path.write_text("\n".join(map(json.dumps, rows)))
    data_args, args, model_args = arguments(
        dataset_name=str(path), train_sampling_strategy="sequential", max_steps=3, eval_strategy="no"
    )
    data_args.max_bad_row_share = 0.4
    trainer = stage_run.train(data_args, args, model_args)
    steps = [entry for entry in trainer.state.log_history if "text" in entry]
    assert [entry["text"] > 0 for entry in steps] == [True, False, True]
    assert [entry["loss"] > 0 for entry in steps] == [True, False, True]
    assert len(listed(tmp_path / "output")) == 4
    assert all(torch.isfinite(value).all() for value in trainer.model.parameters())


def test_evaluation_counts_them(arguments, spoiled: Path, tmp_path: Path) -> None:
    data_args, args, model_args = arguments(
        dataset_name=str(spoiled), max_steps=1, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=8
    )
    data_args.max_bad_row_share, data_args.validation_share = 0.125, 0.9
    trainer = stage_run.train(data_args, args, model_args)
    held_back = {trainer.eval_dataset[index]["source"] for index in range(len(trainer.eval_dataset))}
    assert len(held_back & REASONS.keys()) >= 2, "else there is nothing to see here"
    assert held_back & REASONS.keys() <= listed(tmp_path / "output").keys()
    (evaluated,) = [entry for entry in trainer.state.log_history if "eval_text" in entry]
    assert evaluated["eval_text"] > 0


# Streams


def test_training_from_a_stream(arguments, spoiled: Path, tmp_path: Path) -> None:
    data_args, args, model_args = arguments(
        dataset_name=str(spoiled),
        max_steps=9,
        eval_strategy="steps",
        eval_steps=9,
        distillation_preset="student_heads",
        dataloader_num_workers=1,
    )
    data_args.streaming, data_args.shuffle_buffer_size = True, 8
    # Which rows are held back depends on the folder's name: of 32 rows, a share of 0.1 sometimes holds back none
    data_args.max_bad_row_share, data_args.validation_share = 0.2, 0.3
    trainer = stage_run.train(data_args, args, model_args)
    assert trainer.state.global_step == 9 and trainer.bad_rows.total == 36
    assert len(listed(tmp_path / "output")) >= 3 and listed(tmp_path / "output").keys() <= REASONS.keys()
    assert any("eval_text" in entry for entry in trainer.state.log_history)
    data_args.max_bad_row_share, args.overwrite_output_dir = 0.05, True
    with pytest.raises(ValueError, match=r"[2-5] of 36 rows cannot be used"):
        stage_run.train(data_args, args, model_args)


def test_a_stream_that_holds_back_no_row_cannot_be_evaluated(arguments, spoiled: Path) -> None:
    data_args, args, model_args = arguments(
        dataset_name=str(spoiled), max_steps=1, eval_strategy="steps", eval_steps=1
    )
    data_args.streaming, data_args.max_bad_row_share, data_args.validation_share = True, 0.9, 1e-9
    with pytest.raises(ValueError, match="The evaluation data has no rows"):
        stage_run.train(data_args, args, model_args)


def test_a_stream_may_begin_with_a_bad_row(arguments, tmp_path: Path) -> None:
    rows = llava_rows(12)
    rows[0]["conversations"] = []
    Dataset.from_list(rows).save_to_disk(tmp_path / "rows")
    data_args, args, model_args = arguments(dataset_name=str(tmp_path / "rows"))
    data_args.streaming, data_args.shuffle_buffer_size, data_args.max_bad_row_share = True, 0, 0.2
    trainer = stage_run.train(data_args, args, model_args)
    assert trainer.state.global_step == 3 and trainer.bad_rows.reasons.keys() == {"rows row 0"}


@pytest.mark.parametrize("settings", [{"distillation_preset": "student_heads"}, {"visualize_steps": 1}])
@pytest.mark.parametrize("malformed", [True, False])
def test_a_stream_without_images_ends(arguments, tmp_path: Path, settings: dict[str, Any], malformed: bool) -> None:
    """The statistics of the teachers and the pictures look for one before the first step."""
    rows = llava_rows(12, text_only=() if malformed else tuple(range(12)))
    for row in rows if malformed else ():
        row["conversations"] = []
    Dataset.from_list(rows).save_to_disk(tmp_path / "rows")
    data_args, args, model_args = arguments(dataset_name=str(tmp_path / "rows"), **settings)
    data_args.streaming = True
    reason = "1 of 12 rows cannot be used" if malformed else "Give data with images|no image to draw"
    with pytest.raises(ValueError, match=reason):
        stage_run.train(data_args, args, model_args)


@pytest.mark.parametrize("settings", [{"max_steps": -1}, {"group_by_modality_length": True}])
def test_what_a_stream_cannot_do(arguments, spoiled: Path, settings: dict[str, Any]) -> None:
    data_args, args, model_args = arguments(dataset_name=str(spoiled), **settings)
    data_args.streaming = True
    with pytest.raises(ValueError, match="A stream has no length: set `max_steps`, and do not group"):
        stage_run.train(data_args, args, model_args)


# Two processes


def test_two_processes_agree(parts: dict[str, str], spoiled: Path, tmp_path: Path) -> None:
    """Each finds bad rows of its own, in different steps; all know of all, one writes, and both stop."""
    # Dealt unevenly: one process gets two of the three pieces, and the other is through with its own much earlier
    (tmp_path / "pieces").mkdir()
    for number, count in enumerate((12, 4, 12)):
        Dataset.from_list(llava_rows(count)).to_parquet(tmp_path / "pieces" / f"train-{number}.parquet")
    once = {"max_steps": -1, "num_train_epochs": 1}
    stream = {"streaming": True, "max_steps": 12}
    runs = {
        "good": {"max_bad_row_share": 0.125, **once},
        "stream": {"max_bad_row_share": 0.5, **stream},
        "pieces": {"dataset": str(tmp_path / "pieces"), **stream},
        "stopped": {"max_bad_row_share": 0.1, **once},
    }
    configs = []
    for name, settings in runs.items():
        small = {"per_device_train_batch_size": 2, "dataloader_num_workers": 1}
        dataset = settings.pop("dataset", str(spoiled))
        configs.append(write_settings(tmp_path / "runs" / name, parts, dataset, **small, **settings))
    result = launch(SCRIPT, *configs, launcher=DDP_CPU)
    assert result.returncode != 0, "the last of them is to stop"
    assert "4 of 32 rows cannot be used (12.50%)" in result.stdout, result.stdout[-6000:]
    for name, steps in {"good": 8, "stream": 12, "pieces": 12}.items():
        ranks = [json.loads((tmp_path / "runs" / name / f"facts-{rank}.json").read_text()) for rank in range(2)]
        assert [rank["world_size"] for rank in ranks] == [2, 2] and ranks[0]["called"] == ["DistributedDataParallel"]
        assert len([entry for entry in ranks[0]["log_history"] if "text" in entry]) == steps
        assert ranks[0]["weights"] == ranks[1]["weights"]
    # 48 rows of the stream are more than one pass
    for name in ("good", "stopped", "stream"):
        assert_all_listed(tmp_path / "runs" / name)
    assert not (tmp_path / "runs" / "pieces" / BAD_ROWS_NAME).exists()
