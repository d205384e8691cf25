"""A feature cache that does not belong to the data, the teacher or the preprocessing is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file

from tests.helpers.cached_rows import mixed_rows, write
from train import run as stage_run
from train.build import build_collator, build_teachers
from train.cache_writer import processor_of_recipe
from train.data.datasets import load_conversations


@pytest.mark.parametrize("harm", ["missing", "truncated"])
def test_missing_and_truncated_shards_are_refused(cached, harm: str) -> None:
    settings = cached()
    shard = Path(settings[1].feature_cache) / "vit" / "000001.safetensors"
    content = shard.read_bytes()
    shard.unlink()
    if harm == "truncated":
        shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"{'lacks the shard ' if harm == 'missing' else ''}.*vit/000001.*again"):
        stage_run.train(*settings)


def test_a_flipped_byte_is_found_when_a_shard_is_first_opened_and_written_anew(cached, mixed: str) -> None:
    settings = cached()
    folder = Path(settings[1].feature_cache)
    row = load_conversations(mixed)[4]
    collator = build_collator(settings[1], processor_of_recipe(*settings[1:]), build_teachers(settings[1]))
    whole = collator([row])["cached_features"]["vit"]["tokens"]
    names = ["vit/000000.safetensors", "vit/blank.safetensors", "clip/000001.safetensors"]
    for name in names:
        path = folder / name
        content = path.read_bytes()
        header = 8 + int.from_bytes(content[:8], "little")
        for place in (header, (header + len(content)) // 2, len(content) - 1):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            teacher, shard = name.removesuffix(".safetensors").split("/")
            with pytest.raises(ValueError, match=rf"{name} is damaged: its checksum.*again"):
                build_teachers(settings[1])[teacher].cache.layout.verify(teacher, shard)
    with pytest.raises(ValueError, match=r"is damaged: its checksum"):
        stage_run.train(*settings)
    write(settings)
    collator = build_collator(settings[1], processor_of_recipe(*settings[1:]), build_teachers(settings[1]))
    assert torch.equal(collator([row])["cached_features"]["vit"]["tokens"], whole)


@pytest.mark.parametrize("name", ["index.json", "rows.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff\xfe", None])
def test_a_broken_list_is_refused_and_written_anew(cached, name: str, content: bytes | None) -> None:
    settings = cached()
    path = Path(settings[1].feature_cache) / name
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(ValueError, match=rf"{name} is broken.*Run `python -m train.feature_cache`"):
        build_teachers(settings[1])
    shard = path.parent / "vit" / "000001.safetensors"
    before = shard.stat().st_mtime_ns
    write(settings)
    assert json.loads(path.read_bytes()) == json.loads(whole) and shard.stat().st_mtime_ns == before


def test_a_shard_of_another_cache_is_refused(cached) -> None:
    settings = cached()
    folder = Path(settings[1].feature_cache) / "vit"
    shutil.copy(folder / "000000.safetensors", folder / "000001.safetensors")
    with pytest.raises(ValueError, match=r"000001.safetensors is of another rows: \[\[4, 0\].*, not \[\["):
        stage_run.train(*settings)


def test_an_unfinished_cache_is_refused(arguments, mixed: str, tmp_path: Path) -> None:
    settings = arguments(dataset_name=mixed, max_length=None, feature_cache=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="index.json"):
        stage_run.train(*settings)


def changed(settings: tuple[Any, ...], **fields: Any) -> tuple[Any, ...]:
    teacher = settings[1].teachers[1] | fields
    settings[1].teachers = [settings[1].teachers[0], teacher]
    return settings


@pytest.mark.parametrize(
    ("field", "value", "cached_value"),
    [
        ("image_size", 48, "36"),
        ("mean", [0.1, 0.2, 0.3], r"\[0.5"),
        ("std", [0.1, 0.2, 0.3], r"\[0.5"),
        ("interpolation", "bicubic", "'bilinear'"),
        ("output", 1, "None"),
        ("dtype", "bfloat16", "'float32'"),
        ("revision", "main", "None"),
    ],
)
def test_another_teacher_is_refused(cached, field: str, value: Any, cached_value: str) -> None:
    settings = changed(cached(), **{field: value})
    with pytest.raises(ValueError, match=rf"Teacher vit: `{field}` is {cached_value}.*in the cache, .*in this run"):
        build_teachers(settings[1])
    with pytest.raises(ValueError, match=rf"vit: `{field}` is {cached_value}"):
        write(settings)


def test_what_the_recipe_said_cannot_be_left_to_the_model(cached, parts: dict[str, str]) -> None:
    clip, vit = ({"name": name, "model": parts[name]} for name in ("clip", "vit"))
    settings = cached(teachers=[clip, vit | {"image_size": 48}])
    assert build_teachers(settings[1])["vit"].grid == (8, 8)
    settings[1].teachers = [clip, vit]
    with pytest.raises(ValueError, match="vit: `image_size` is 48 in the cache, None in this run"):
        build_teachers(settings[1])


def test_a_cache_of_an_earlier_version_serves_all_but_summaries(cached) -> None:
    settings = cached()
    folder = Path(settings[1].feature_cache)
    index = json.loads((folder / "index.json").read_text())
    for teacher in index["teachers"].values():
        del teacher["summary_width"]
        teacher["tensors"].pop("summary", None)
    for shard in folder.glob("vit/*.safetensors"):
        assert "summary" in load_file(shard)
        shard.unlink()
    (folder / "index.json").write_text(json.dumps(index))
    write(settings)  # goes on in the earlier form
    assert not any("summary" in load_file(shard) for shard in folder.glob("vit/*.safetensors"))
    assert build_teachers(settings[1])["vit"].summary_width is None
    settings[1].summary_heads = True
    with pytest.raises(ValueError, match=r"stored no summaries of \['clip', 'vit'\]"):
        build_teachers(settings[1])


def test_other_weights_are_refused(cached, parts: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(parts["vit"], tmp_path / "vit")
    teachers = [{"name": "clip", "model": parts["clip"]}, {"name": "vit", "model": str(tmp_path / "vit")}]
    settings = cached(teachers=teachers)
    build_teachers(settings[1])
    weights = load_file(tmp_path / "vit" / "model.safetensors")
    save_file({name: value + 0.1 for name, value in weights.items()}, tmp_path / "vit" / "model.safetensors")
    with pytest.raises(ValueError, match="vit: `weights` is"):
        build_teachers(settings[1])
    # Training needs no teacher
    shutil.rmtree(tmp_path / "vit")
    assert build_teachers(settings[1])["vit"].width == 24


def test_another_geometry_is_refused(cached) -> None:
    data_args, args, model_args = cached()
    args.geometry = "per_teacher"
    with pytest.raises(ValueError, match="`geometry` is 'shared' in the cache, 'per_teacher' in this run"):
        build_collator(args, processor_of_recipe(args, model_args), build_teachers(args))
    with pytest.raises(ValueError, match="`geometry` is 'shared'"):
        write((data_args, args, model_args))
    args.geometry, args.image_aspect_ratio = "shared", "anyres"
    with pytest.raises(ValueError, match="`crop` is 'pad' in the cache, 'whole' in this run"):
        build_collator(args, processor_of_recipe(args, model_args), build_teachers(args))


@pytest.mark.parametrize(("dtype", "rows", "field"), [("int8", 5, "dtype"), ("float16", 6, "rows_per_shard")])
def test_a_cache_is_not_mixed(cached, dtype: str, rows: int, field: str) -> None:
    with pytest.raises(ValueError, match=f"`{field}` is .* in the cache, .* in this run"):
        write(cached(), dtype, rows)


def other_images(rows: list[dict[str, Any]]) -> None:
    rows[6]["image"], rows[7]["image"] = rows[7]["image"], rows[6]["image"]


def fewer_images(rows: list[dict[str, Any]]) -> None:
    rows[4]["image"] = rows[4]["image"][:1]
    rows[4]["conversations"][0]["value"] = "<image>\nWhat colour is it?"


def more_rows(rows: list[dict[str, Any]]) -> None:
    rows.append(rows[6])


@pytest.mark.parametrize(("change", "row"), [(other_images, 6), (fewer_images, 4), (more_rows, 24)])
def test_other_data_is_refused(cached, tmp_path: Path, change: Callable, row: int) -> None:
    settings = cached()
    rows = mixed_rows()
    change(rows)
    Dataset.from_list(rows).save_to_disk(tmp_path / "other")
    settings[0].dataset_name = str(tmp_path / "other")
    with pytest.raises(ValueError, match=rf"row {row} has the images .* in the cache of 24 rows, .* in the data"):
        stage_run.train(*settings)
    with pytest.raises(ValueError, match="data: `(fingerprint|images|rows)` is .* in the cache, .* in this run"):
        write(settings)


def test_another_image_of_the_same_name_is_refused(cached, mixed: str) -> None:
    settings = cached()
    collator = build_collator(settings[1], processor_of_recipe(*settings[1:]), build_teachers(settings[1]))
    row = load_conversations(mixed)[6]
    collator([row])
    content = bytearray(row["images"][0]["bytes"])
    other = bytes(content) + b"\0"  # no decoder reads the last byte
    with pytest.raises(ValueError, match="features are of another image"):
        collator([row | {"images": [{"bytes": other, "path": None}]}])


def test_streams_are_refused(arguments, cached, mixed: str, tmp_path: Path) -> None:
    settings = arguments(dataset_name=mixed, feature_cache=str(tmp_path / "other"))
    settings[0].streaming = True
    with pytest.raises(ValueError, match="not a stream.*`streaming: false`"):
        write(settings)
    assert not (tmp_path / "other").exists()
    settings = cached()
    settings[0].streaming = True
    with pytest.raises(ValueError, match="not a stream.*leave out `feature_cache`"):
        stage_run.train(*settings)


def test_what_the_model_says_itself_may_be_said_again(cached) -> None:
    assert build_teachers(changed(cached(), image_size=36, interpolation="bilinear")[1])["vit"].grid == (6, 6)
