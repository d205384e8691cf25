"""Writes the teachers' features of a data set to a folder, which training then reads instead of running them."""

import dataclasses
import hashlib
import json
import math
import os
import shutil
import zlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset, concatenate_datasets
from filelock import FileLock, Timeout
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer, ProcessorMixin

from modeling_movekd import MoveKDConfig
from modeling_movekd.processing import add_image_token, build_processor
from train.build import build_collator, teacher_configs
from train.config import DataArguments, ModelArguments, MoveKDSFTConfig, save_json
from train.data.bad_rows import BadRows
from train.data.collator import MoveKDCollator
from train.data.datasets import load_train_and_validation
from train.teachers.cache_shards import BLANK, UNREADABLE, ShardLayout, decode, encode
from train.teachers.cached import INDEX_NAME, ROWS_NAME, check_same, image_bytes, live_facts, rows_of
from train.teachers.features import FrozenTeacher
from train.teachers.loaders import load_teacher


@dataclass
class CacheArguments:
    """
    How features are kept.

    Args:
        cache_dtype (`str`, defaults to `"float16"`): `"float16"`, or `"int8"` per channel and image.
        rows_per_shard (`int`, defaults to 128): Rows with images whose features go into one file of each teacher.
    """

    cache_dtype: Literal["float16", "int8"] = field(
        default="float16", metadata={"help": "float16, or int8 per channel."}
    )
    rows_per_shard: int = field(default=128, metadata={"help": "Rows with images per file."})

    def __post_init__(self) -> None:
        if self.rows_per_shard < 1:
            raise ValueError(f"`rows_per_shard` is {self.rows_per_shard}; give a positive number.")


def load_processor(args: MoveKDSFTConfig, model_args: ModelArguments) -> ProcessorMixin:
    """The student's processor as [`train.build.build_student`] makes it, as far as teachers' pixels go, without it."""
    if model_args.model_name_or_path is not None:
        return AutoProcessor.from_pretrained(
            model_args.model_name_or_path, revision=model_args.model_revision, trust_remote_code=False
        )
    if args.vision_model is None or args.language_model is None:
        raise ValueError(
            "The recipe names no student: give `model_name_or_path`, or `vision_model` and `language_model`."
        )
    vision = AutoConfig.from_pretrained(args.vision_model, trust_remote_code=False)
    vision = getattr(vision, "vision_config", vision)
    tokenizer = AutoTokenizer.from_pretrained(args.language_model, trust_remote_code=False)
    config = MoveKDConfig(
        vision_config={"image_size": vision.image_size, "patch_size": vision.patch_size},
        image_token_index=add_image_token(tokenizer),
        image_aspect_ratio=args.image_aspect_ratio,
        image_grid_pinpoints=[[vision.image_size, vision.image_size]],  # tiles are the student's alone
    )
    return build_processor(
        config, AutoImageProcessor.from_pretrained(args.vision_model, trust_remote_code=False), tokenizer
    )


class _TeacherPixels(torch.utils.data.Dataset):
    """Of each row one teacher's pixels of its images, their checksums, and (row, reason) if one is unreadable."""

    def __init__(self, dataset: Dataset, collator: MoveKDCollator, name: str) -> None:
        self.dataset, self.collator, self.name = dataset, collator, name

    def __getitem__(self, place: int) -> tuple[torch.Tensor, list[int], list[tuple[str, str]]]:
        row = self.dataset[place]
        # Through the whole collator, so that the teacher gets what it would get in training
        batch = self.collator([row])
        pixels, count = batch["teacher_pixel_values"][self.name], len(row["images"])
        if batch["bad_rows"]:
            return pixels[:1].expand(count, -1, -1, -1), [UNREADABLE] * count, batch["bad_rows"]
        if len(pixels) != count:
            raise ValueError(
                f"Row {row['row_index']} has {count} images, of which teacher {self.name} gets {len(pixels)}: "
                "features of anything but whole images are not cached."
            )
        return pixels, [zlib.crc32(image_bytes(image)) for image in row["images"]], []


def _together(
    rows: list[tuple[torch.Tensor, list[int], list[tuple[str, str]]]],
) -> tuple[torch.Tensor, list[int], list[tuple[str, str]]]:
    pixels, checksums, bad = zip(*rows, strict=True)
    return torch.cat(pixels), [*chain(*checksums)], [*chain(*bad)]


def cache_features(
    data_args: DataArguments, args: MoveKDSFTConfig, model_args: ModelArguments, cache_args: CacheArguments
) -> dict[str, dict[str, float]]:
    """
    Write the feature cache of a recipe to `args.feature_cache`, on all processes together.

    Returns:
        By teacher the measured errors: `relative_error`, the norm of the difference over that of the features, and
        `largest_error` of any value.

    Raises:
        ValueError: if the recipe names no folder or no teacher, the folder holds the cache of something else (naming
            the field and both values) or another run is writing to it, the disk has too little space, or too many
            images cannot be decoded.
    """
    if args.feature_cache is None or not args.distill:
        raise ValueError(
            f"`feature_cache` is {args.feature_cache} and `distill` {args.distill}: name the folder to write to, and "
            "teachers."
        )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != args.world_size:
        raise ValueError(f"{launched} processes were launched, {args.world_size} met; on CPUs add `--use_cpu true`.")
    folder, state = Path(args.feature_cache), PartialState()
    with _lock(folder) if state.is_main_process else nullcontext():
        return _write_cache(folder, state, data_args, args, model_args, cache_args)


def _lock(folder: Path) -> AbstractContextManager[Any]:
    """Held in a `with` statement; the system releases that of a killed process. Beside the folder, which a run that is
    refused does not make."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(folder.with_name(f".{folder.name}.lock")).acquire(blocking=False)
    except Timeout as error:
        raise ValueError(
            f"Another run is writing the feature cache {folder}. Start again when it has ended."
        ) from error


def _write_cache(
    folder: Path,
    state: PartialState,
    data_args: DataArguments,
    args: MoveKDSFTConfig,
    model_args: ModelArguments,
    cache_args: CacheArguments,
) -> dict[str, dict[str, float]]:
    bad_rows = BadRows(None, data_args.max_bad_row_share, data_args.max_bad_rows)
    loaded = load_train_and_validation(
        data_args, bad_rows, args.seed, args.eval_strategy != "no", args.dataset_num_proc
    )
    datasets = [dataset for dataset in loaded if dataset is not None]
    rows = rows_of(*datasets)
    teachers = {config.name: load_teacher(config) for config in teacher_configs(args)}
    # Neither the text nor its length matters here
    collator = build_collator(args, load_processor(args, model_args), teachers)
    collator = dataclasses.replace(collator, max_length=None, labels="answers", distill_text_only_rows=False)
    blanks = blank_features(collator, teachers, cache_args.cache_dtype)
    index = _index(folder, rows, collator, teachers, blanks, cache_args)
    layout = ShardLayout(rows, index)

    missing = {
        name: [shard for shard in layout.shards if not _is_done(layout, folder, name, shard)] for name in blanks
    }
    missing = broadcast_object_list([missing])[0]
    _check_size(folder, layout, missing, state)
    state.wait_for_everyone()
    if state.is_main_process:
        for name, blank in blanks.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            for left_behind in (folder / name).glob(".*.tmp"):
                left_behind.unlink()
            if BLANK in missing[name]:
                _save(layout, folder, name, BLANK, blank, [0], {})
        save_json(rows, folder / ROWS_NAME)
        save_json(index, folder / INDEX_NAME)
    state.wait_for_everyone()

    dataset = concatenate_datasets(datasets)
    places = dict(zip(reversed(dataset["row_index"][:]), reversed(range(len(dataset))), strict=True))
    for name, teacher in teachers.items():
        shards = [shard for shard in missing[name] if shard != BLANK][state.process_index :: state.num_processes]
        pixels = _TeacherPixels(
            dataset, dataclasses.replace(collator, teacher_preprocessors={name: teacher.preprocessor}), name
        )
        size = args.per_device_train_batch_size
        batches: dict[str, list[list[int]]] = {}
        for shard in shards:
            of_shard = [places[row] for row in layout.rows[shard]]
            batches[shard] = [of_shard[start : start + size] for start in range(0, len(of_shard), size)]
        loader = iter(
            DataLoader(
                pixels,
                batch_sampler=[batch for shard in shards for batch in batches[shard]],
                collate_fn=_together,
                num_workers=args.dataloader_num_workers,
            )
        )
        teacher.to(args.device)
        for shard in tqdm(shards, desc=name, unit="shard", disable=args.disable_tqdm or not state.is_main_process):
            parts = []
            for _ in batches[shard]:
                values, checksums, bad = next(loader)
                bad_rows.add(bad)
                parts.append((*_encode_and_measure(teacher, values.to(args.device), index["dtype"]), checksums))
            encoded = {key: torch.cat([part[0][key] for part in parts]) for key in parts[0][0]}
            _save(
                layout,
                folder,
                name,
                shard,
                encoded,
                [value for part in parts for value in part[2]],
                _sum_measures([part[1] for part in parts]),
            )
        teacher.to("cpu")

    state.wait_for_everyone()
    errors = {name: _errors(layout, folder, name) for name in teachers}
    if state.is_main_process:
        save_json(index | {"errors": index.get("errors", {}) | errors}, folder / INDEX_NAME)
        for name, measured in errors.items():
            print(
                f"{name}: {index['dtype']} is off by {measured['relative_error']:.1e} of the features' norm, a value "
                f"by {measured['largest_error']:.1e} at most; {measured['unreadable_images']} images are unreadable."
            )
        print(f"The feature cache is complete. Train with `feature_cache: {folder}`.", flush=True)
    state.wait_for_everyone()
    return errors


def blank_features(
    collator: MoveKDCollator, teachers: Mapping[str, FrozenTeacher], dtype: str
) -> dict[str, dict[str, torch.Tensor]]:
    """By teacher, the encoded features of the black image that stands in where a batch has none."""
    messages = [{"role": role, "content": [{"type": "text", "text": "black"}]} for role in ("user", "assistant")]
    pixels = collator([{"messages": messages, "images": [], "row_index": -1}])["teacher_pixel_values"]
    return {name: _encode_and_measure(teacher, pixels[name], dtype)[0] for name, teacher in teachers.items()}


def _index(
    folder: Path,
    rows: dict[str, list[Any]],
    collator: MoveKDCollator,
    teachers: Mapping[str, FrozenTeacher],
    blanks: Mapping[str, Mapping[str, torch.Tensor]],
    cache_args: CacheArguments,
) -> dict[str, Any]:
    """What the cache will be of; what the folder holds already must be of the same, but may have other teachers."""
    index: dict[str, Any] = {
        "data": {
            "rows": len(rows["row_index"]),
            "images": sum(len(images) for images in rows["images"]),
            "fingerprint": hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16],
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
        index["teachers"][name] = live_facts(teacher) | {"tensors": tensors}
    if not (folder / INDEX_NAME).is_file():
        return index
    found = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))
    what = f"`feature_cache` {folder}"
    for part in ("data", "geometry"):
        check_same(f"{what}, {part}", found[part], index[part])
    for part in ("dtype", "rows_per_shard"):
        check_same(what, {part: found[part]}, {part: index[part]})
    for name in found["teachers"].keys() & index["teachers"].keys():
        # How the recipe says it may differ, as long as it comes to the same
        cached, needed = found["teachers"][name], index["teachers"][name]
        check_same(f"{what}, teacher {name}", cached, needed | {"asked": cached["asked"]})
    return found | {"teachers": index["teachers"] | found["teachers"]}


def _is_done(layout: ShardLayout, folder: Path, name: str, shard: str) -> bool:
    try:
        return bool(layout.check(folder, name, shard))
    except ValueError:
        return False


def _check_size(folder: Path, layout: ShardLayout, missing: Mapping[str, Sequence[str]], state: PartialState) -> None:
    """Print what the cache takes on disk, and refuse to start if there is less."""
    needed, lines = 0, []
    images = sum(len(keys) for keys in layout.keys.values())
    for name, shards in missing.items():
        tensors = layout.index["teachers"][name]["tensors"].values()
        size = sum(math.prod(shape) * getattr(torch, dtype).itemsize for dtype, shape in tensors)
        left = size * sum(len(layout.keys[shard]) for shard in shards)
        needed += left
        lines.append(
            f"{name}: {images} images of {size / 1e6:.3g} MB, {size * images / 1e9:.4g} GB; {left / 1e9:.4g} GB to "
            f"write in {len(shards)} of {len(layout.shards)} shards."
        )
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    lines.append(
        f"Together {needed / 1e9:.4g} GB to write to {folder}, where {free / 1e9:.4g} GB are free, by "
        f"{state.num_processes} processes."
    )
    if state.is_main_process:
        print("\n".join(lines), flush=True)
    if needed > free:
        raise ValueError(
            f"{needed / 1e9:.4g} GB are needed in {folder}, {free / 1e9:.4g} GB are free. Free space, name another "
            "folder, or halve it by `cache_dtype` int8."
        )


def _encode_and_measure(
    teacher: FrozenTeacher, pixels: torch.Tensor, dtype: str
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
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
        "images": float(len(tokens)),
    }
    return {key: value.cpu().contiguous() for key, value in encoded.items()}, measures


def _sum_measures(measures: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {
        key: (max if key == "largest_error" else math.fsum)(part.get(key, 0.0) for part in measures)
        for key in ("squared_error", "squared_norm", "largest_error", "images", "unreadable_images")
    }


def _errors(layout: ShardLayout, folder: Path, name: str) -> dict[str, float]:
    """The errors measured over all shards; every shard is checked on the way."""
    total = _sum_measures([json.loads(layout.check(folder, name, shard)["errors"]) for shard in layout.shards])
    return {
        "relative_error": math.sqrt(total["squared_error"] / max(total["squared_norm"], 1e-30)),
        "largest_error": total["largest_error"],
        "images": int(total["images"]),
        "unreadable_images": int(total["unreadable_images"]),
    }


def _save(
    layout: ShardLayout,
    folder: Path,
    name: str,
    shard: str,
    encoded: Mapping[str, torch.Tensor],
    checksums: list[int],
    measures: dict[str, float],
) -> None:
    path = layout.path(folder, name, shard)
    temporary = path.with_name(f".{path.name}.tmp")
    measures["unreadable_images"] = checksums.count(UNREADABLE)
    header = layout.header(name, shard) | {"format": "pt", "errors": json.dumps(measures)}
    try:
        save_file({**encoded, "checksums": torch.tensor(checksums)}, temporary, metadata=header)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
