"""Each script runs at toy size; the tests check the form of its output, never a time."""

import importlib
import json
import os
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoConfig

from benchmarks.speed import efficiency, quantization, scaling, serving
from modeling_movekd import MoveKDConfig, MoveKDVisionConfig
from train.build import build_student
from train.demo.run import RECIPES, parse_recipe


TABLES = {
    "commands": ("Answers of the commands", 2),
    "losses": ("Losses and heads", 2),
    "loading": ("Loading and import", 3),
    "encoders": ("Encoders side by side", 7),
    "inference": ("Inference", 2),
    "training_step": ("Step of training", 3),
    "remote_code": ("Loading a checkpoint by its own code", 2),
    "first_start": ("Start on a large JSON file", 5),
}
# What `benchmarks.on_gpu` runs besides
GPU_TABLES = {"devices": ("Device against CPU", 9), "small_recipe": ("The small recipe", 3)}


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in ("remote_code", "first_start") else name
        for name in TABLES
    ],
)
def test_a_table_as_markdown_and_json(script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    title, number = TABLES[script]
    out = tmp_path / "tables.json"
    importlib.import_module(f"benchmarks.speed.{script}").main(
        ["--toy", "--repeats", "1", "--threads", "1", "--device", "cpu", "--out", str(out)]
    )
    printed = capsys.readouterr().out
    table = json.loads(out.read_text())[title]
    assert f"### {title}" in printed and "threads: 1" in printed
    assert len(table["rows"]) == number
    for row in table["rows"]:
        assert row["ours"] > 0 and row["rival"] > 0 and row["ratio"] > 0
        assert row["what"] in printed


@pytest.mark.slow
@pytest.mark.parametrize("script", GPU_TABLES)
def test_what_is_meant_for_a_gpu_runs_on_a_cpu(script: str, tmp_path: Path) -> None:
    title, number = GPU_TABLES[script]
    out = tmp_path / "tables.json"
    flags = ["--toy", "--repeats", "1", "--threads", "1", "--device", "cpu", "--out", str(out)]
    importlib.import_module(f"benchmarks.speed.{script}").main(flags)
    rows = json.loads(out.read_text())[title]["rows"]
    assert len(rows) == number
    errors = [row for row in rows if row["what"].startswith("relative error")]
    assert all(row["reached"] for row in errors) and len(errors) == (8 if script == "devices" else 0)


@pytest.mark.slow
def test_servers_are_asked_by_several_clients(tmp_path: Path) -> None:
    """vLLM too, where `VLLM_PYTHON` names an interpreter that has it."""
    vllm, out = os.environ.get("VLLM_PYTHON"), tmp_path / "tables.json"
    flags = ["--toy", "--repeats", "1", "--threads", "1", "--device", "cpu", "--clients", "1", "2", "--out", str(out)]
    serving.main([*flags, *(["--vllm-python", vllm] if vllm else [])])
    rows = json.loads(out.read_text())["Serving"]["rows"]
    assert len(rows) == 4 and all(row["ours"] > 0 and (row["rival"] is not None) == bool(vllm) for row in rows)


def test_quantized_weights_are_smaller_and_answer(tmp_path: Path) -> None:
    _, args, model_args = parse_recipe(RECIPES[0])
    for part in build_student(args, model_args):
        part.save_pretrained(tmp_path / "student")
    out = tmp_path / "table.json"
    quantization.main([str(tmp_path / "student"), "--toy", "--threads", "1", "--device", "cpu", "--out", str(out)])
    rows = json.loads(out.read_text())["Quantized weights over whole ones"]["rows"]
    sizes = [row["ratio"] for row in rows if "weights" in row["what"]]
    assert len(rows) == 4 and 1 > sizes[0] > sizes[1]


def test_student_clip_and_teachers_as_table_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = MoveKDVisionConfig(**sizes, image_size=28, patch_size=14, num_experts=2, lora_rank=2)
    MoveKDConfig(vision_config=vision, text_config=AutoConfig.for_model("llama", **sizes)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="--teachers"):
        efficiency.main([str(tmp_path), "--toy"])
    picture, out = tmp_path / "efficiency.png", tmp_path / "table.json"
    taught = [f"teacher {name}" for name in ("detector", "reader")]
    folders = [f"train/demo/weights/{name}" for name in ("detector", "reader")]
    flags = ["--toy", "--teachers", *folders, "--repeats", "1", "--threads", "1", "--device", "cpu"]
    efficiency.main([str(tmp_path), *flags, "--picture", str(picture), "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert list(rows) == ["student", "plain CLIP", *taught, "all teachers"]
    assert all(set(row) == set(efficiency.COLUMNS) and min(row.values()) > 0 for row in rows.values())
    for column in ("parameters", "FLOPs"):
        assert rows["all teachers"][column] == pytest.approx(sum(rows[name][column] for name in taught))
    # Two of CLIP's layers with experts, against three without
    assert rows["student"]["FLOPs"] < rows["plain CLIP"]["FLOPs"]
    assert "| student |" in capsys.readouterr().out
    assert Image.open(picture).size[0] > 500


def test_curves_over_the_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture, out = tmp_path / "scaling.png", tmp_path / "curves.json"
    flags = ["--toy", "--repeats", "1", "--threads", "1", "--device", "cpu"]
    scaling.main([*flags, "--picture", str(picture), "--out", str(out)])
    curves = json.loads(out.read_text())["curves"]
    assert list(curves) == ["image size", "batch", "experts", "rank", "teachers"]
    for curve in curves.values():
        assert all(len(seconds) == len(curve["at"]) and min(seconds) > 0 for seconds in curve["seconds"].values())
    assert "| image size | 28, 56 | forward |" in capsys.readouterr().out
    assert Image.open(picture).size[0] > 500
