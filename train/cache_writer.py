"""Writes the teachers' features of a data set to a folder, from which training reads them."""

import dataclasses
import json
import math
import os
import shutil
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import concatenate, gather_object, send_to_device
from datasets import Dataset, concatenate_datasets
from filelock import FileLock, Timeout
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, ProcessorMixin

from hub.checkpoint_parts import tower_config
from modeling_movekd import MoveKDConfig
from modeling_movekd.files import TEMPORARY_PREFIX, new_file, save_json
from modeling_movekd.processing import add_image_token, build_processor, load_processor
from train.arguments import CacheArguments, DataArguments, ModelArguments
from train.build import build_collator, build_image_collator, teacher_configs
from train.build_encoder import load_encoder_processor
from train.config import MoveKDSFTConfig
from train.data.bad_rows import BadRows
from train.data.collator import MoveKDCollator
from train.data.conversations import STAND_IN
from train.data.datasets import load_train_and_validation
from train.data.image_collator import ImageCollator, black_image, decode_rows, named_problems, teacher_pixels
from train.distributed import timeouts_named
from train.teachers.cache_shards import BLANK, UNREADABLE, ShardLayout, decode, encode, shard_checksum
from train.teachers.cached import (
    INDEX_NAME,
    ROWS_NAME,
    check_same,
    fingerprint,
    image_bytes,
    loaded_teacher,
    read_index,
    rows_of,
)
from train.teachers.features import FrozenTeacher
from train.teachers.loaders import load_teacher
from train.teachers.preprocessing import ResizedImages


def processor_of_recipe(args: MoveKDSFTConfig, model_args: ModelArguments) -> ProcessorMixin:
    """The processor of [`train.build.build_student`] without loading the student; for teachers' pixels only."""
    if model_args.model_name_or_path is not None:
        return load_processor(model_args.model_name_or_path, model_args.model_revision)
    if args.vision_model is None or args.language_model is None:
        raise ValueError(
            "The recipe names no student. Set `model_name_or_path`, or `vision_model` and `language_model`."
        )
    vision = AutoConfig.from_pretrained(args.vision_model, trust_remote_code=False)
    vision = tower_config(vision)
    tokenizer = AutoTokenizer.from_pretrained(args.language_model, trust_remote_code=False)
    config = MoveKDConfig(
        vision_config={"image_size": vision.image_size, "patch_size": vision.patch_size},
        image_token_index=add_image_token(tokenizer),
        image_aspect_ratio=args.image_aspect_ratio,
        image_grid_pinpoints=[[vision.image_size, vision.image_size]],  # teachers see no tiles
    )
    return build_processor(
        config, AutoImageProcessor.from_pretrained(args.vision_model, trust_remote_code=False), tokenizer
    )


def collator_of_recipe(
    args: MoveKDSFTConfig, model_args: ModelArguments, teachers: Mapping[str, FrozenTeacher]
) -> MoveKDCollator | ImageCollator:
    """The collator of training, for teachers' pixels only, without loading the student."""
    if args.stage == "encoder":
        if model_args.model_name_or_path is None and args.vision_model is None:
            raise ValueError("The recipe names no encoder. Set `vision_model`, or `model_name_or_path`.")
        return build_image_collator(args, load_encoder_processor(args, model_args), teachers)
    collator = build_collator(args, processor_of_recipe(args, model_args), teachers)
    # The text does not matter here, nor does its length
    return dataclasses.replace(collator, max_length=None, labels="answers", distill_text_only_rows=False)


class _TeacherPixels(torch.utils.data.Dataset):
    """For each row the pixels of one teacher, the checksums of the images, and the bad rows."""

    def __init__(self, dataset: Dataset, collator: MoveKDCollator | ImageCollator, teacher: FrozenTeacher) -> None:
        self.dataset, self.collator = dataset, collator
        self.preprocessors = {teacher.name: teacher.preprocessor}

    def __getitem__(self, position: int) -> tuple[ResizedImages, list[int], list[tuple[str, str]]]:
        row, collator = self.dataset[position], self.collator
        (images,), problems = decode_rows([row], collator.apply_orientation)
        if isinstance(collator, ImageCollator):
            processor = collator.image_processor
        else:
            processor = collator.processor.image_processor
        # As in the collators, but the student's pixels and text are not needed
        images = images or [black_image(processor)] * len(row["images"])
        (pixels,) = teacher_pixels(images, self.preprocessors, processor, collator.geometry).values()
        if problems:
            return pixels, [UNREADABLE] * len(images), named_problems([row], problems)
        return pixels, [zlib.crc32(image_bytes(image)) for image in row["images"]], []


def _concatenate(
    rows: list[tuple[ResizedImages, list[int], list[tuple[str, str]]]],
) -> tuple[ResizedImages, list[int], list[tuple[str, str]]]:
    pixels, checksums, bad = zip(*rows, strict=True)
    return concatenate(list(pixels)), [*chain(*checksums)], [*chain(*bad)]


def cache_features(
    data_args: DataArguments, args: MoveKDSFTConfig, model_args: ModelArguments, cache_args: CacheArguments
) -> dict[str, dict[str, float]]:
    """
    Write the feature cache of a recipe to the folder `args.feature_cache`, on all processes together.

    Returns:
        By teacher, `relative_error` (norm of the encoding error over the norm of the features), `largest_error` of a
        value, and the number of `unreadable_images`.

    Raises:
        ValueError: if the recipe has no folder or no teacher, the folder holds another cache, another run writes to
            it, the disk is too small, or too many images cannot be decoded.
    """
    if args.feature_cache is None or not args.distill:
        raise ValueError(
            f"`feature_cache` is {args.feature_cache} and `distill` {args.distill}. Name the folder to write to, and "
            "teachers."
        )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != args.world_size:
        raise ValueError(
            f"{launched} processes were launched, but {args.world_size} are connected. On CPUs add `--use_cpu true`."
        )
    folder = Path(args.feature_cache)
    with _lock(folder) if PartialState().is_main_process else nullcontext():
        return _write_cache(folder, data_args, args, model_args, cache_args)


def _lock(folder: Path) -> AbstractContextManager[Any]:
    # Beside the folder, so that a run that is refused creates no folder. The system releases the lock of a killed run
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(folder.with_name(f".{folder.name}.lock")).acquire(blocking=False)
    except Timeout as error:
        raise ValueError(f"Another run is writing the feature cache {folder}. Wait for its end.") from error


def _write_cache(
    folder: Path,
    data_args: DataArguments,
    args: MoveKDSFTConfig,
    model_args: ModelArguments,
    cache_args: CacheArguments,
) -> dict[str, dict[str, float]]:
    state = PartialState()
    bad_rows = BadRows(None, data_args.max_bad_row_share, data_args.max_bad_rows)
    loaded = load_train_and_validation(
        data_args,
        bad_rows,
        args.seed,
        args.eval_strategy != "no",
        args.dataset_num_proc,
        images_only=args.stage == "encoder",
    )
    datasets = [dataset for dataset in loaded if dataset is not None]
    rows = rows_of(*datasets)
    teachers = {config.name: load_teacher(config) for config in teacher_configs(args)}
    collator = collator_of_recipe(args, model_args, teachers)
    blanks = _blank_features(collator, teachers, cache_args.cache_dtype)
    index = _index(folder, rows, collator, teachers, blanks, cache_args)
    layout = ShardLayout(folder, rows, index)
    missing = _missing_shards(layout, teachers, state)
    _check_disk_space(layout, missing, state)
    state.wait_for_everyone()
    if state.is_main_process:
        for name, blank in blanks.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            for left_behind in (folder / name).glob(f"{TEMPORARY_PREFIX}*"):
                left_behind.unlink()
            if BLANK in missing[name]:
                _save(layout, name, BLANK, blank, [0], [])
        save_json(rows, folder / ROWS_NAME)
        save_json(index, folder / INDEX_NAME)
    state.wait_for_everyone()

    dataset = concatenate_datasets(datasets)
    for name, teacher in teachers.items():
        shards = [shard for shard in missing[name] if shard != BLANK][state.process_index :: state.num_processes]
        pixels = _TeacherPixels(dataset, collator, teacher)
        with timeouts_named(args):
            _write_shards(layout, teacher, shards, pixels, args, bad_rows)
    state.wait_for_everyone()
    errors = {name: _measured_errors(layout, name) for name in teachers}
    if state.is_main_process:
        save_json(index | {"errors": index.get("errors", {}) | errors}, folder / INDEX_NAME)
        for name, error in errors.items():
            print(
                f"{name}: relative error of {index['dtype']} {error['relative_error']:.1e}, largest error of a value "
                f"{error['largest_error']:.1e}, {error['unreadable_images']} unreadable images."
            )
        print(f"The feature cache is complete. Train with `feature_cache: {folder}`.", flush=True)
    state.wait_for_everyone()
    return errors


def _write_shards(
    layout: ShardLayout,
    teacher: FrozenTeacher,
    shards: Sequence[str],
    pixels: _TeacherPixels,
    args: MoveKDSFTConfig,
    bad_rows: BadRows,
) -> None:
    positions = {row: position for position, row in enumerate(pixels.dataset["row_index"][:])}
    size = args.per_device_train_batch_size
    batches = {}
    for shard in shards:
        of_shard = [positions[row] for row in layout.rows[shard]]
        batches[shard] = [of_shard[start : start + size] for start in range(0, len(of_shard), size)]
    loader = iter(
        DataLoader(
            pixels,
            batch_sampler=list(chain(*batches.values())),
            collate_fn=_concatenate,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.device.type == "cuda",
            timeout=args.dataloader_timeout if args.dataloader_num_workers else 0,
        )
    )
    teacher.to(args.device)
    hidden = args.disable_tqdm or not PartialState().is_main_process
    for shard in tqdm(shards, desc=teacher.name, unit="shard", disable=hidden):
        parts, checksums, measures = [], [], []
        for _ in batches[shard]:
            values, of_batch, bad = next(loader)
            bad_rows.add(bad)
            encoded, measured = _encode(
                teacher, send_to_device(values, args.device, non_blocking=True), layout.index["dtype"]
            )
            parts.append(encoded)
            measures.append(measured)
            checksums += of_batch
        encoded = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        _save(layout, teacher.name, shard, encoded, checksums, measures)
    teacher.to("cpu")


def _blank_features(
    collator: MoveKDCollator | ImageCollator, teachers: Mapping[str, FrozenTeacher], dtype: str
) -> dict[str, dict[str, torch.Tensor]]:
    """By teacher, the encoded features of the black image that a batch without images gets."""
    pixels = collator([{"messages": STAND_IN, "images": []}])["teacher_pixel_values"]
    return {name: _encode(teacher, pixels[name], dtype)[0] for name, teacher in teachers.items()}


def _index(
    folder: Path,
    rows: dict[str, list[Any]],
    collator: MoveKDCollator | ImageCollator,
    teachers: Mapping[str, FrozenTeacher],
    blanks: Mapping[str, Mapping[str, torch.Tensor]],
    cache_args: CacheArguments,
) -> dict[str, Any]:
    """The content of `index.json`. The folder may hold this cache already, with other teachers too."""
    index: dict[str, Any] = {
        "data": {
            "rows": len(rows["row_index"]),
            "images": sum(len(images) for images in rows["images"]),
            "fingerprint": fingerprint(rows),
        },
        "geometry": collator.teacher_geometry,
        "dtype": cache_args.cache_dtype,
        "rows_per_shard": cache_args.rows_per_shard,
        "teachers": {},
    }
    for name, teacher in teachers.items():
        tensors = {
            key: [str(value.dtype).removeprefix("torch."), list(value.shape[1:])]
            for key, value in blanks[name].items()
        }
        index["teachers"][name] = loaded_teacher(teacher) | {"tensors": tensors}
    if not (folder / INDEX_NAME).is_file():
        return index
    try:
        found = read_index(folder)
    except ValueError as error:
        # Its shards say themselves what they are of
        print(f"Written anew: {error}", flush=True)
        return index
    what = f"`feature_cache` {folder}"
    for part in ("data", "geometry"):
        check_same(f"{what}, {part}", found[part], index[part])
    for part in ("dtype", "rows_per_shard"):
        check_same(what, {part: found[part]}, {part: index[part]})
    for name in found["teachers"].keys() & index["teachers"].keys():
        # The recipe may now set what it left to the model's files before, if the features stay the same
        cached, needed = found["teachers"][name], index["teachers"][name]
        if "summary_width" not in cached:  # an earlier version stored no summaries
            del needed["summary_width"]
            needed["tensors"].pop("summary", None)
        check_same(f"{what}, teacher {name}", cached, needed | {"asked": cached["asked"]})
    return found | {"teachers": index["teachers"] | found["teachers"]}


def _missing_shards(layout: ShardLayout, teachers: Iterable[str], state: PartialState) -> dict[str, list[str]]:
    """By teacher, the shards to write. Each process reads a part of those that exist, to verify them."""
    shards = [(name, shard) for name in teachers for shard in layout.keys]
    own = [key for key in shards[state.process_index :: state.num_processes] if not _is_complete(layout, *key)]
    missing = set(gather_object(own))
    return {name: [shard for shard in layout.keys if (name, shard) in missing] for name in teachers}


def _is_complete(layout: ShardLayout, teacher: str, shard: str) -> bool:
    try:
        layout.check(teacher, shard)
        layout.verify(teacher, shard)
    except ValueError:
        return False
    return True


def _check_disk_space(layout: ShardLayout, missing: Mapping[str, Sequence[str]], state: PartialState) -> None:
    """Print the size of the cache. Raise a `ValueError` if the disk has less space than the missing shards need."""
    needed, lines = 0, []
    images = sum(len(keys) for keys in layout.keys.values())
    for name, shards in missing.items():
        tensors = layout.index["teachers"][name]["tensors"].values()
        size = sum(math.prod(shape) * getattr(torch, dtype).itemsize for dtype, shape in tensors)
        left = size * sum(len(layout.keys[shard]) for shard in shards)
        needed += left
        lines.append(
            f"{name}: {images} images of {size / 1e6:.3g} MB, {size * images / 1e9:.4g} GB; {left / 1e9:.4g} GB to "
            f"write in {len(shards)} of {len(layout.keys)} shards."
        )
    folder = layout.folder
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    lines.append(
        f"In total {needed / 1e9:.4g} GB to write to {folder} by {state.num_processes} processes; {free / 1e9:.4g} GB "
        "are free."
    )
    if state.is_main_process:
        print("\n".join(lines), flush=True)
    if needed > free:
        raise ValueError(
            f"{needed / 1e9:.4g} GB are needed in {folder}, {free / 1e9:.4g} GB are free. Free space, choose another "
            "folder, or halve the size with `cache_dtype` int8."
        )


def _encode(
    teacher: FrozenTeacher, pixels: ResizedImages, dtype: str
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Encoded features on the CPU, and the errors of the encoding."""
    features = teacher(pixels)
    try:
        encoded = encode(features, dtype)
    except ValueError as error:
        raise ValueError(f"Teacher {teacher.name}: {error}") from error
    tokens = features.tokens.float()
    difference = decode(encoded, features.grid).tokens - tokens
    measures = {
        "squared_error": difference.square().sum().item(),
        "squared_norm": tokens.square().sum().item(),
        "largest_error": difference.abs().max().item(),
    }
    return {key: value.cpu().contiguous() for key, value in encoded.items()}, measures


def _total(measures: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {
        key: (max if key == "largest_error" else math.fsum)(part.get(key, 0.0) for part in measures)
        for key in ("squared_error", "squared_norm", "largest_error", "unreadable_images")
    }


def _measured_errors(layout: ShardLayout, teacher: str) -> dict[str, float]:
    """The errors over all shards, from their headers. Every shard is checked."""
    total = _total([json.loads(layout.check(teacher, shard)["errors"]) for shard in layout.keys])
    return {
        "relative_error": math.sqrt(total["squared_error"] / max(total["squared_norm"], 1e-30)),
        "largest_error": total["largest_error"],
        "unreadable_images": int(total["unreadable_images"]),
    }


def _save(
    layout: ShardLayout,
    teacher: str,
    shard: str,
    encoded: Mapping[str, torch.Tensor],
    checksums: list[int],
    measures: Sequence[Mapping[str, float]],
) -> None:
    errors = (_total(measures) if measures else {}) | {"unreadable_images": checksums.count(UNREADABLE)}
    stored = layout.index["teachers"][teacher]["tensors"]
    tensors = {**{name: encoded[name] for name in stored}, "checksums": torch.tensor(checksums)}
    header = layout.header(teacher, shard) | {"format": "pt", "errors": json.dumps(errors)}
    with new_file(layout.path(teacher, shard)) as temporary:
        save_file(tensors, temporary, metadata=header | {"checksum": shard_checksum(tensors)})
