"""A run with a feature cache equals a run with live teachers; a cache of other data is refused."""

import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from trl import TrlParser

from tests.helpers.cached_rows import TEXT_ONLY, write
from tests.helpers.colored_rows import llava_rows
from tests.helpers.launched import DDP_CPU, ROOT, launch, write_settings
from train import run as stage_run
from train.arguments import DataArguments, ModelArguments
from train.build import build_collator, build_teachers
from train.cache_writer import CacheArguments, cache_features, processor_of_recipe
from train.config import MoveKDSFTConfig
from train.data.datasets import load_conversations
from train.feature_cache import main
from train.teachers.cache_shards import decode, encode
from train.teachers.cached import CachedTeacher, rows_of
from train.teachers.features import TeacherFeatures
from train.trainer import MoveKDTrainer


def features() -> TeacherFeatures:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(3, 12, 7, generator=generator) * torch.logspace(-3, 3, 7)
    tokens[:, :, 2] = 40 + 0.01 * tokens[:, :, 2]  # a channel far from zero that varies little
    tokens[1, :, 4] = 0.25  # a channel that does not vary
    return TeacherFeatures(tokens, (3, 4), tokens[:, 0], tokens[:, :, :2].transpose(1, 2).softmax(-1))


def test_float16_is_rounded_once() -> None:
    live = features()
    encoded = encode(live, "float16")
    assert torch.equal(decode(encoded, (3, 4)).tokens, live.tokens.half().float())


def test_int8_is_off_by_half_a_step_of_each_channel_and_image() -> None:
    live = features()
    encoded = encode(live, "int8")
    assert encoded["tokens"].dtype == torch.int8 and encoded["scale"].shape == (3, 7)
    back = decode(encoded, (3, 4))
    step = (live.tokens.amax(dim=1) - live.tokens.amin(dim=1)) / 254
    error = (back.tokens - live.tokens).abs()
    assert (error <= 0.5 * step.unsqueeze(1) + 1e-6 * live.tokens.abs()).all()
    assert (error.amax(dim=1) > 0.1 * step)[:, :4].all(), "the bound is one that the codes come near to"
    assert torch.equal(back.tokens[1, :, 4], torch.full((12,), 0.25))
    assert torch.equal(back.cls, live.cls) and torch.equal(back.cls_attention, live.cls_attention)


@pytest.mark.parametrize(("value", "dtype", "message"), [(7e4, "float16", "int8"), (math.nan, "int8", "finite")])
def test_features_that_cannot_be_kept_raise(value: float, dtype: str, message: str) -> None:
    tokens = torch.zeros(1, 4, 3)
    tokens[0, 1, 2] = value
    with pytest.raises(ValueError, match=message):
        encode(TeacherFeatures(tokens, (2, 2)), dtype)


def run(settings: tuple[Any, ...]) -> tuple[MoveKDTrainer, list[dict[str, TeacherFeatures]]]:
    """Runs `train.run.train`, and records the features that each forward of the distiller got."""
    got: list[dict[str, TeacherFeatures]] = []

    def keep(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        got.append(dict(inputs[1]))

    original = MoveKDTrainer.train

    def train(self: MoveKDTrainer, *args: Any, **kwargs: Any) -> Any:
        self.model.distiller.register_forward_pre_hook(keep)
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MoveKDTrainer, "train", train)
        return stage_run.train(*settings), got


@pytest.mark.parametrize("image_aspect_ratio", ["pad", "anyres"])
@pytest.mark.parametrize("preset", ["paper", "radio", "released"])
@pytest.mark.parametrize("cache_dtype", ["float16", "int8"])
def test_training_gives_the_same_losses(
    arguments, cached, mixed, cache_dtype: str, preset: str, image_aspect_ratio: str
) -> None:
    common = {
        "image_aspect_ratio": image_aspect_ratio,
        "distillation_preset": preset,
        "group_by_modality_length": True,
        "dataloader_num_workers": 1 if cache_dtype == "int8" else 0,
        "lora_dropout": 0.0,
        "max_steps": 6,
    }
    live, live_features = run(arguments(dataset_name=mixed, max_length=None, **common))
    settings = cached(cache_dtype, **common)
    trainer, cached_features = run(settings)
    assert all(isinstance(teacher, CachedTeacher) for teacher in trainer.teachers.values())
    assert not list(trainer.teachers["vit"].parameters())

    errors = json.loads((Path(settings[1].feature_cache) / "index.json").read_text())["errors"]
    assert len(live_features) == len(cached_features) == 6
    for one, other in zip(live_features, cached_features, strict=True):
        for name, measured in errors.items():
            # The same images in the same order: another image would be off by its own size
            assert (one[name].tokens - other[name].tokens).abs().max() <= measured["largest_error"] * 1.001 + 1e-9
            assert measured["largest_error"] < 0.02 * one[name].tokens.abs().max()
    tolerance = {"float16": 5e-4, "int8": 1e-2}[cache_dtype]
    histories = [[entry for entry in each.state.log_history if "text" in entry] for each in (live, trainer)]
    for one, other in zip(*histories, strict=True):
        assert one.keys() == other.keys()
        for term in ("loss", "text", "kd", "kd/vit", "kd/clip", "kd/vit/summary", "balance", "grad_norm"):
            if term in one:
                assert other[term] == pytest.approx(one[term], rel=tolerance, abs=1e-5), term
    assert any("kd/vit" in entry for entry in histories[0])


def test_both_stages_share_one_cache(cached, arguments, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    settings = cached(stage="pretrain", max_steps=1)
    stage_run.train(*settings)
    overrides = {"dataset_name": settings[0].dataset_name, "max_length": None, "max_steps": 1}
    second = arguments(
        model_name_or_path=str(tmp_path / "output"),
        feature_cache=settings[1].feature_cache,
        output_dir=str(tmp_path / "second"),
        **overrides,
    )
    capsys.readouterr()
    write(second)
    assert "in 0 of 4 shards" in capsys.readouterr().out
    stage_run.train(*second)
    facts = json.loads((tmp_path / "second" / "training_facts.json").read_text())
    folder = Path(settings[1].feature_cache).name
    for stage in (*facts["earlier_stages"], facts):
        cache = stage["feature_cache"]
        assert (cache["folder"], cache["dtype"], list(cache["teachers"])) == (folder, "float16", ["clip", "vit"])
        of_vit = cache["teachers"]["vit"]
        assert (of_vit["model"], of_vit["revision"], of_vit["commit"]) == ("vit", None, None)
        assert 0 < of_vit["relative_error"] < 1e-3 and 0 < of_vit["largest_error"] < 0.1
    card = (tmp_path / "second" / "README.md").read_text()
    assert f"`folder` `{folder}`, `dtype` `float16`, `teachers` (`clip` (`model` `clip`, `relative_error` 0.0" in card


def test_rows_are_found_in_any_order(arguments, cached, mixed: str) -> None:
    settings = cached("float16", rows_per_shard=4)
    dataset = load_conversations(mixed)
    live = build_collator(settings[1], processor_of_recipe(*settings[1:]), build_teachers(arguments()[1]))
    read = build_collator(settings[1], processor_of_recipe(*settings[1:]), build_teachers(settings[1]))
    teachers, stand_ins = build_teachers(arguments()[1]), build_teachers(settings[1])
    for batch in ([23, 4, 0, 10], [10, 9, 8, 4], [0, 1], [12, 6]):
        rows = [dataset[index] for index in batch]
        pixels, features = live(rows), read(rows)
        assert "teacher_pixel_values" not in features and "cached_features" not in pixels
        # No trainer casts the features on the way to the device
        cached_values = [value for each in features["cached_features"].values() for value in each.values()]
        assert cached_values and not any(value.is_floating_point() for value in cached_values)
        for name, teacher in teachers.items():
            expected = teacher(pixels["teacher_pixel_values"][name])
            got = stand_ins[name](features["cached_features"][name])
            assert got.grid == expected.grid and got.tokens.dtype == torch.float32
            assert torch.equal(got.tokens, expected.tokens.half().float()) or torch.allclose(
                got.tokens, expected.tokens, rtol=1e-3, atol=1e-4
            )
            if name == "clip":
                torch.testing.assert_close(got.cls, expected.cls)
                torch.testing.assert_close(got.cls_attention, expected.cls_attention)


def test_evaluation_reads_the_rows_held_back(arguments, mixed: str, tmp_path: Path) -> None:
    settings = arguments(
        dataset_name=mixed, max_length=None, feature_cache=str(tmp_path / "cache"), eval_strategy="steps", eval_steps=3
    )
    settings[0].validation_share = 0.4
    write(settings)
    trainer = stage_run.train(*settings)
    assert any("eval_kd/vit" in entry for entry in trainer.state.log_history)


def test_every_shard_says_what_it_is_of(cached, parts: dict[str, str]) -> None:
    settings = cached("int8")
    folder = Path(settings[1].feature_cache)
    index = json.loads((folder / "index.json").read_text())
    assert index["data"]["rows"] == 24 and index["data"]["images"] == 17
    for name in ("clip", "vit"):
        shards = sorted((folder / name).iterdir())
        assert [path.name for path in shards] == [
            f"{stem}.safetensors" for stem in ("000000", "000001", "000002", "blank")
        ]
        keys = []
        for path in shards[:-1]:
            with safe_open(path, "pt") as file:
                header = file.metadata()
                assert header["dtype"] == '"int8"' and json.loads(header["data"]) == index["data"]
                teacher = json.loads(header["teacher"])
                assert (teacher["model"], teacher["revision"]) == (parts[name], None)
                assert teacher["image_size"] == {"clip": 16, "vit": 36}[name] and len(teacher["mean"]) == 3
                assert (teacher["grid"], teacher["width"]) == {"clip": ([4, 4], 32), "vit": ([6, 6], 24)}[name]
                keys += json.loads(header["rows"])
                tokens = file.get_slice("tokens")
                assert tokens.get_shape()[1:] == [math.prod(teacher["grid"]), teacher["width"]]
                assert ("cls_attention" in file.keys()) is (name == "clip")
        assert len(keys) == 17 and [4, 1] in keys and [10, 2] in keys and not any(row in TEXT_ONLY for row, _ in keys)
    assert 0 < index["errors"]["vit"]["relative_error"] < 0.01
    facts = build_teachers(settings[1])["vit"].cache.facts
    assert facts["dtype"] == "int8" and list(facts["teachers"]) == ["clip", "vit"]
    assert facts["teachers"]["vit"] == {
        **{"model": parts["vit"], "revision": None, "commit": None},
        **{name: index["errors"]["vit"][name] for name in ("relative_error", "largest_error")},
    }
    assert not list(folder.rglob(".tmp-*"))


def test_a_killed_run_goes_on_at_the_missing_shards(cached, capsys: pytest.CaptureFixture) -> None:
    settings = cached()
    folder = Path(settings[1].feature_cache)
    shards = sorted(folder.rglob("*.safetensors"))
    whole = {path: path.read_bytes() for path in shards}
    lost, cut, *kept = shards
    lost.unlink()
    cut.write_bytes(whole[cut][:-5])
    (folder / "vit" / ".tmp-1234-000001.safetensors").write_bytes(b"left behind")
    times = {path: path.stat().st_mtime_ns for path in kept}
    capsys.readouterr()
    write(settings)
    assert "write in 2 of 4 shards" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in kept} == times
    # The header's entries have no fixed order
    assert {path: load_file(path).keys() for path in shards} and not list(folder.rglob(".tmp-*"))
    for path in (lost, cut):
        remade = load_file(path)
        path.write_bytes(whole[path])
        for name, value in load_file(path).items():
            assert torch.equal(value, remade[name])


def test_a_cache_in_the_former_spelling_is_read(cached, capsys: pytest.CaptureFixture) -> None:
    settings = cached()
    folder = Path(settings[1].feature_cache)
    index = (folder / "index.json").read_text()
    assert '"center_crop"' in index
    (folder / "index.json").write_text(index.replace("center_crop", "centre_crop"))
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            header = {field: value.replace("center_crop", "centre_crop") for field, value in file.metadata().items()}
        save_file(load_file(path), path, metadata=header)
    build_teachers(settings[1])
    capsys.readouterr()
    write(settings)
    assert "in 0 of 4 shards" in capsys.readouterr().out


def test_two_runs_do_not_write_one_cache_at_a_time(cached) -> None:
    settings = cached()
    folder = Path(settings[1].feature_cache)
    lost = next(folder.rglob("*.safetensors"))
    lost.unlink()
    lock = folder.with_name(f".{folder.name}.lock")
    with FileLock(lock), pytest.raises(ValueError, match="Another run is writing the feature cache"):
        write(settings)
    assert not lost.exists()
    write(settings)
    assert lost.exists()


def test_two_processes_finish_what_a_killed_one_began(parts: dict[str, str], tmp_path: Path) -> None:
    Dataset.from_list(llava_rows(200)).save_to_disk(tmp_path / "rows")
    config = write_settings(tmp_path / "output", parts, str(tmp_path / "rows"))
    flags = ["train.feature_cache", "--config", str(config), "--rows_per_shard", "2", "--cache_dtype", "int8"]
    folder = tmp_path / "cache"
    process = subprocess.Popen([sys.executable, "-m", *flags, "--feature_cache", str(folder)], cwd=ROOT)
    while not (folder / "vit" / "000002.safetensors").is_file():
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.005)
    process.kill()
    process.wait()
    done = {path: path.stat().st_mtime_ns for path in folder.rglob("[0-9]*.safetensors")}
    assert 100 < len(done) < 200
    cut = TrlParser((DataArguments, MoveKDSFTConfig, ModelArguments)).parse_args_and_config(
        ["--config", str(config), "--feature_cache", str(folder)]
    )
    with pytest.raises(ValueError, match="lacks the shard .*vit/"):
        stage_run.train(*cut)

    result = launch("-m", *flags, "--feature_cache", str(folder), launcher=DDP_CPU)
    assert result.returncode == 0, result.stdout[-4000:]
    assert f"write in {200 - len(done)} of 101 shards" in result.stdout and "by 2 processes" in result.stdout
    assert {path: path.stat().st_mtime_ns for path in done} == done
    cut[1].feature_cache = str(tmp_path / "whole")
    errors = cache_features(*cut, CacheArguments("int8", 2))
    assert json.loads((folder / "index.json").read_text())["errors"] == {
        name: pytest.approx(measured, rel=1e-3) for name, measured in errors.items()
    }
    shards = {path.relative_to(folder): path for path in folder.rglob("*.safetensors")}
    assert len(shards) == 202 and not list(folder.rglob(".tmp-*"))
    for name, path in shards.items():
        whole = load_file(tmp_path / "whole" / name)
        for key, value in load_file(path).items():
            torch.testing.assert_close(value, whole[key], msg=str(name))


def test_a_teacher_more_is_added(cached, parts: dict[str, str], capsys: pytest.CaptureFixture) -> None:
    settings = cached(teachers=[{"name": "clip", "model": parts["clip"]}])
    settings[1].teachers = [*settings[1].teachers, {"name": "vit", "model": parts["vit"]}]
    with pytest.raises(ValueError, match=r"has the teachers \['clip'\], this run needs vit"):
        build_teachers(settings[1])
    capsys.readouterr()
    write(settings)
    printed = capsys.readouterr().out
    assert "in 0 of 4 shards" in printed and "in 4 of 4 shards" in printed
    assert set(build_teachers(settings[1])) == {"clip", "vit"}
    assert set(json.loads((Path(settings[1].feature_cache) / "index.json").read_text())["errors"]) == {"clip", "vit"}


def test_images_in_a_folder_that_moves(arguments, tmp_path: Path) -> None:
    def save(folder: Path) -> None:
        rows = []
        for index, row in enumerate(llava_rows(8)):
            path = Path("pictures") / f"{index}.png"
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            row["image"].save(folder / path)
            rows.append(row | {"image": str(path), "id": str(index)})
        (folder / "rows.json").write_text(json.dumps(rows))

    save(tmp_path / "here")
    save(tmp_path / "there")
    settings = arguments(dataset_name=str(tmp_path / "here" / "rows.json"), feature_cache=str(tmp_path / "cache"))
    write(settings)
    rows = rows_of(load_conversations(tmp_path / "here" / "rows.json"))
    assert rows["images"][3] == ["pictures/3.png"]
    settings[0].dataset_name = str(tmp_path / "there" / "rows.json")
    stage_run.train(*settings)
    shutil.copy(tmp_path / "there" / "pictures" / "1.png", tmp_path / "there" / "pictures" / "0.png")
    with pytest.raises(ValueError, match="features are of another image"):
        stage_run.train(*settings)


def test_unreadable_images_are_counted_and_their_rows_left_out(arguments, mixed: str, tmp_path: Path) -> None:
    rows = load_conversations(mixed).to_list()
    folder = tmp_path / "rows"
    broken = [
        row | {"images": [{"bytes": b"no image", "path": None}]} if index == 6 else row
        for index, row in enumerate(rows)
    ]
    Dataset.from_list(broken).select_columns(["messages", "images"]).save_to_disk(folder)
    settings = arguments(dataset_name=str(folder), max_length=None, feature_cache=str(tmp_path / "cache"))
    settings[0].max_bad_row_share = 0.1
    errors = write(settings)
    assert errors["vit"]["unreadable_images"] == 1
    stage_run.train(*settings)
    settings[0].max_bad_row_share = 0.01
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(ValueError, match="max_bad_row_share"):
        write(settings)


def test_the_size_is_said_first_and_a_full_disk_refused(
    arguments, mixed: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    settings = arguments(dataset_name=mixed, max_length=None, feature_cache=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="GB are needed in .*cache, 1e-06 GB are free"):
        write(settings)
    # 18 images including the blank image, of 6 x 6 x 24 values of two bytes, and a summary of 24 values of four
    assert f"vit: 18 images of 0.00182 MB, {18 * 24 * (36 * 2 + 4) / 1e9:.4g} GB" in capsys.readouterr().out
    assert not (tmp_path / "cache").exists()


def test_command_line(parts: dict[str, str], mixed: str, tmp_path: Path) -> None:
    config = tmp_path / "recipe.yaml"
    config.write_text(
        json.dumps(
            {
                "dataset_name": [mixed],
                "vision_model": parts["clip"],
                "language_model": parts["language"],
                "teachers": [{"name": "clip", "model": parts["clip"]}, {"name": "vit", "model": parts["vit"]}],
                "output_dir": str(tmp_path / "output"),
                "use_cpu": True,
                "bf16": False,
                "report_to": "none",
            }
        )
    )
    main(["--config", str(config), "--feature_cache", str(tmp_path / "cache"), "--cache_dtype", "int8"])
    index = json.loads((tmp_path / "cache" / "index.json").read_text())
    assert index["dtype"] == "int8" and set(index["errors"]) == {"clip", "vit"}
    assert not (tmp_path / "output").exists()
