"""Loads training and validation rows: data sets, mixtures and streams, all converted to the same columns."""

import json
import logging
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import (
    Dataset,
    Features,
    IterableDataset,
    concatenate_datasets,
    interleave_datasets,
)

from train.arguments import DataArguments
from train.data import conversations, image_rows, json_rows, plain_conversations
from train.data.arrow_rows import load_json_rows
from train.data.bad_rows import BadRows
from train.data.conversations import FEATURES, convert_row
from train.data.image_rows import IMAGE_FEATURES, convert_image_batch, convert_images, only_images
from train.data.plain_conversations import convert_rows
from train.data.sources import open_image_folder, open_rows, undecoded_images


logger = logging.getLogger(__name__)

CHUNK = 10_000


@dataclass(frozen=True)
class RowForm:
    """
    What rows are converted to.

    Args:
        convert (`Callable`): Makes a list of rows of a row.
        map_options (`dict`): The same as arguments of `Dataset.map`.
        features (`Features`): The columns.
        code (`str`): File of the converter.
        convert_many (`Callable`): Makes a table of a list of rows and the position of the first.
    """

    convert: Callable[..., list[dict[str, Any]]]
    map_options: dict[str, Any]
    features: Features
    code: str
    convert_many: Callable[..., pa.Table]


def _image_table(rows: Sequence[Any], first: int, **kwargs: Any) -> pa.Table:
    made = [image for index, row in enumerate(rows, first) for image in convert_images(row, index, **kwargs)]
    columns = {name: [image[name] for image in made] for name in IMAGE_FEATURES}
    return Dataset.from_dict(columns, IMAGE_FEATURES).data.table


CONVERSATIONS = RowForm(
    lambda *args, **kwargs: [convert_row(*args, **kwargs)],
    {"function": convert_row, "desc": "Reading conversations"},
    FEATURES,
    conversations.__file__,
    convert_rows,
)
# Batched, since a row may have several images; in small batches, since images are large
IMAGES = RowForm(
    convert_images,
    {"function": convert_image_batch, "batched": True, "batch_size": 100, "desc": "Reading images"},
    IMAGE_FEATURES,
    image_rows.__file__,
    _image_table,
)


@dataclass
class DataSource:
    """
    A data set of a mixture.

    Args:
        name (`str`): LLaVA file (`.json`, `.jsonl`), `.parquet` file or folder of them, folder written by
            `Dataset.save_to_disk`, or id of a data set on the Hub.
        weight (`float`, *optional*): Share of the mixture, relative to the other weights.
        image_folder (`str`, *optional*): Folder that relative image paths start from.
        subset (`str`, *optional*): Configuration of a data set on the Hub.
        split (`str`, *optional*): Split to train on.
    """

    name: str
    weight: float | None = None
    image_folder: str | None = None
    subset: str | None = None
    split: str | None = None


def data_sources(data_args: DataArguments) -> list[DataSource]:
    """The data sets of `dataset_name`, in order."""
    names: Any = data_args.dataset_name
    sources = []
    for name in [names] if isinstance(names, str | os.PathLike | Mapping) else names:
        keys: dict[str, Any] = dict(name) if isinstance(name, Mapping) else {"name": str(name)}
        allowed = list(DataSource.__dataclass_fields__)
        if "name" not in keys or not set(keys) <= set(allowed):
            raise ValueError(
                f"A data set of dataset_name has the keys {list(keys)}. Give 'name', and any of {allowed}."
            )
        source = DataSource(**keys)
        source.image_folder = source.image_folder or data_args.image_folder
        source.split = source.split or data_args.dataset_train_split
        sources.append(source)
    weights = [source.weight for source in sources if source.weight is not None]
    if (weights and len(weights) < len(sources)) or any(weight <= 0 for weight in weights):
        shown = [source.weight for source in sources]
        raise ValueError(
            f"The weights of dataset_name are {shown}. Give every data set a positive weight, or none of them."
        )
    return sources


def load_train_and_validation(
    data_args: DataArguments,
    bad_rows: BadRows,
    seed: int = 0,
    evaluate: bool = False,
    num_proc: int | None = None,
    images_only: bool = False,
) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]:
    """
    Load the rows to train on and the rows to evaluate on.

    Without weights the data sets are concatenated. With weights each next row is drawn from a data set by its weight,
    in the order of that data set, until one data set (`first_exhausted`) or all of them (`all_exhausted`, the shorter
    ones repeated) are used up. A training stream starts again at its end, each data set of a weighted mixture by
    itself, so that no process runs out of rows before the others. Whether a row is held back for validation depends
    on the seed and on a checksum of its position in its data set (in a stream: of its content), not on the mixture.

    Args:
        data_args (`DataArguments`): What to load.
        bad_rows (`BadRows`): Counts the rows that cannot be used.
        seed (`int`, defaults to 0): Seed of mixture, validation split and order of a stream.
        evaluate (`bool`, defaults to `False`): Whether the run evaluates.
        num_proc (`int`, *optional*): Processes that convert the rows of Parquet files and saved data sets.
        images_only (`bool`, defaults to `False`): Load the images alone, a row for each. Text is ignored, and a row
            without an image is left out.

    Returns:
        The training rows, and the validation rows or `None`, both as from [`load_conversations`], without `messages`
        and `modality_length` if `images_only`.
    """
    share = data_args.validation_share
    if share and not evaluate:
        raise ValueError(
            f"validation_share is {share}, but eval_strategy is 'no'. Set eval_strategy, or no validation_share."
        )
    sources, form = data_sources(data_args), IMAGES if images_only else CONVERSATIONS
    train, validation = [], []
    for number, source in enumerate(sources):
        first_index = bad_rows.total
        rows = _load(sources, number, source.split, data_args, bad_rows, num_proc, form)
        if evaluate and share:
            rows, held_back = split_rows(rows, share, seed, first_index)
            validation.append(held_back)
        elif evaluate:
            held_back = _load(sources, number, data_args.dataset_test_split, data_args, bad_rows, num_proc, form)
            validation.append(held_back)
        train.append(rows)
    mixture = _mix(train, sources, data_args, seed)
    if not validation:
        return mixture, None
    held_back = concatenate_datasets(validation)
    if data_args.streaming:
        # A single shard, since processes with different shards would evaluate different numbers of batches
        held_back = IterableDataset.from_generator(_rows_of, features=form.features, gen_kwargs={"stream": held_back})
    return mixture, held_back


def _mix(
    train: Sequence[Dataset | IterableDataset], sources: Sequence[DataSource], data_args: DataArguments, seed: int
) -> Dataset | IterableDataset:
    weights = [source.weight for source in sources if source.weight is not None]
    if len(train) > 1 and weights:
        return interleave_datasets(
            # A repeated mixture would end with its shortest data set, and start all of them again
            [_endless(rows, data_args.shuffle_buffer_size, seed) for rows in train] if data_args.streaming else train,
            probabilities=[weight / sum(weights) for weight in weights],
            seed=seed,
            stopping_strategy=data_args.mixture_stopping_strategy,
        )
    mixture = train[0] if len(train) == 1 else concatenate_datasets(train)
    return _endless(mixture, data_args.shuffle_buffer_size, seed) if data_args.streaming else mixture


def _load(
    sources: Sequence[DataSource],
    number: int,
    split: str | None,
    data_args: DataArguments,
    bad_rows: BadRows,
    num_proc: int | None,
    form: RowForm,
) -> Any:
    source, split = sources[number], split or "train"
    names = [_report_name(each.name, split, each.subset) for each in sources]
    alone = names.count(names[number]) == 1
    return load_rows(
        form,
        source.name,
        source.image_folder,
        split,
        subset=source.subset,
        streaming=data_args.streaming,
        bad_rows=bad_rows,
        num_proc=num_proc,
        name=names[number] if alone else f"{names[number]} (data set {number + 1})",
    )


def _report_name(source: Any, split: str, subset: str | None) -> str:
    path = Path(source) if isinstance(source, str | os.PathLike) else None
    name = "" if path is None else path.name if path.exists() else str(source)
    parts = [part for part in (subset, None if split == "train" else split) if part]
    return f"{name} ({', '.join(parts)})" if parts else name


def _endless(stream: IterableDataset, buffer_size: int, seed: int) -> IterableDataset:
    if buffer_size > 1:
        stream = stream.shuffle(seed=seed, buffer_size=buffer_size)
    # Shuffle before repeating: the buffer must not mix two passes, which would show some rows twice and others never
    return stream.repeat(None)


def _rows_of(stream: IterableDataset) -> Iterator[dict[str, Any]]:
    yield from stream


def load_conversations(
    source: str | os.PathLike | Dataset | Sequence[Mapping[str, Any]],
    image_folder: str | os.PathLike | None = None,
    split: str = "train",
    max_bad_row_share: float = 0.01,
    num_proc: int | None = None,
    subset: str | None = None,
    streaming: bool = False,
    bad_rows: BadRows | None = None,
    name: str | None = None,
) -> Dataset | IterableDataset:
    """
    Read a data set and convert its rows to messages and undecoded images. No image file is opened.

    As in the original code, the image of a turn is put in front of its text, its placeholder is removed, and a leading
    answer is dropped. Several images of a turn keep their places. Malformed rows, and rows whose placeholders and
    images disagree, are skipped and reported.

    Args:
        source: LLaVA file (`.json`, `.jsonl`), `.parquet` file or folder of them, folder written by
            `Dataset.save_to_disk`, folder of images with `metadata.csv` (ImageFolder), id of a data set on the Hub,
            `datasets.Dataset`, or list of rows. Rows have the fields of one of `conversations.FORMATS`, and `image` or
            `images` as path, picture or list of them.
        image_folder (`str`, *optional*, defaults to the folder of a LLaVA file): Folder that relative image paths
            start from; an ImageFolder is its own. A path that leads out of it as written raises. Links inside it
            are followed.
        split (`str`, defaults to `"train"`): Split of a data set that has splits.
        max_bad_row_share (`float`, defaults to 0.01): Largest share of bad rows, if `bad_rows` is not given.
        num_proc (`int`, *optional*): Processes that convert the rows of a `datasets.Dataset`.
        subset (`str`, *optional*): Configuration of a data set on the Hub.
        streaming (`bool`, defaults to `False`): Read rows on demand. Bad rows are then passed on with their `problem`.
        bad_rows (`BadRows`, *optional*): Counts the bad rows of several calls. Its `total` grows by the rows read.
        name (`str`, *optional*): Name in reports, different for every call with the same `bad_rows`. By default the
            file, folder or id, with subset and split.

    Returns:
        `Dataset`, or `IterableDataset` if `streaming`, with the columns `messages`, `images` (list of
        `{"bytes", "path"}`), `row_index` (unique over all calls with the same `bad_rows`; in a stream the position in
        its shard), `source` (name of the row in reports) and `modality_length` (words of all turns, negative for a
        text-only row, for `ModalityLengthGroupedSampler`). A stream also has `problem`.

    Raises:
        ValueError: if too many rows are bad, no row is left, the source cannot be read, or an image path leads out of
            the image folder.
    """
    bad_rows = BadRows(max_share=max_bad_row_share) if bad_rows is None else bad_rows
    return load_rows(CONVERSATIONS, source, image_folder, split, num_proc, subset, streaming, bad_rows, name)


def load_rows(
    form: RowForm,
    source: str | os.PathLike | Dataset | Sequence[Mapping[str, Any]],
    image_folder: str | os.PathLike | None,
    split: str,
    num_proc: int | None,
    subset: str | None,
    streaming: bool,
    bad_rows: BadRows,
    name: str | None,
) -> Dataset | IterableDataset:
    """[`load_conversations`] for rows of any form."""
    folder = _image_root(source, image_folder)
    directory = source if isinstance(source, str | os.PathLike) and os.path.isdir(source) else None
    scanned = open_image_folder(directory, split) if directory is not None and form is IMAGES else None
    rows: Any = scanned
    if scanned is None:
        rows = open_rows(source, split, subset, streaming)
    elif streaming:
        rows = scanned.to_iterable_dataset()
    if directory is not None and (scanned is not None or _is_image_folder(rows)):
        folder = os.path.abspath(directory)
    name = _report_name(source, split, subset) if name is None else name
    if form is IMAGES and isinstance(rows, Dataset | IterableDataset):
        rows = only_images(rows, name)
    fn_kwargs: dict[str, Any] = {"folder": folder, "name": name, "offset": bad_rows.total}
    if isinstance(rows, IterableDataset):
        return _convert_stream(form, rows, fn_kwargs)
    if isinstance(rows, Path):
        convert = partial(form.convert_many, **fn_kwargs)
        converted, count = load_json_rows(rows, convert, form.features, [fn_kwargs, _code_version(form)])
    else:
        converted, count = _convert_rows(form, rows, fn_kwargs, num_proc), len(rows)
    if not count:
        raise ValueError(f"{name or 'The data set'} has no row.")
    if form is IMAGES:
        converted = _with_own_indices(converted, count, fn_kwargs)
    if streaming:
        return converted.to_iterable_dataset()
    return _without_bad_rows(converted, bad_rows)


def _with_own_indices(images: Dataset, num_rows: int, fn_kwargs: Mapping[str, Any]) -> Dataset:
    """Number the images, of which a row may have several, and say how many rows have none."""
    if missing := num_rows - len(set(images["row_index"][:])):
        logger.warning("%s: %d of %d rows have no image. They are left out.", fn_kwargs["name"], missing, num_rows)
    if not len(images):
        raise ValueError(f"{fn_kwargs['name'] or 'The data set'} has no image in {num_rows} rows.")
    first = fn_kwargs["offset"]
    features = images.features
    images = images.remove_columns("row_index").add_column("row_index", range(first, first + len(images)))
    return images.select_columns(list(features))


def _image_root(
    source: str | os.PathLike | Dataset | Sequence[Mapping[str, Any]], image_folder: str | os.PathLike | None
) -> str | None:
    path = Path(source) if isinstance(source, str | os.PathLike) else None
    if path is not None and path.suffix in (".json", ".jsonl"):
        image_folder = path.parent if image_folder is None else image_folder
    folder = None if image_folder is None else os.path.abspath(image_folder)
    if folder is not None and not os.path.isdir(folder):
        raise ValueError(f"There is no image folder {folder}.")
    return folder


def _convert_stream(form: RowForm, rows: IterableDataset, fn_kwargs: dict[str, Any]) -> IterableDataset:
    names = rows.column_names or list(next(iter(rows), {}))
    fn_kwargs["sharded"] = rows.num_shards > 1
    options = {key: value for key, value in form.map_options.items() if key != "desc"}
    stream = (rows.decode(False) if rows.features else rows).map(
        **options, with_indices=True, fn_kwargs=fn_kwargs, remove_columns=names, features=form.features
    )
    if next(iter(stream), None) is None:
        raise ValueError(f"{fn_kwargs['name'] or 'The data set'} has no {'image' if form is IMAGES else 'row'}.")
    return stream


def _convert_rows(
    form: RowForm, rows: Dataset | Sequence[Mapping[str, Any]], fn_kwargs: dict[str, Any], num_proc: int | None
) -> Dataset:
    if isinstance(rows, Dataset):
        # datasets caches the result by the arguments, so the code is one of them
        fn_kwargs["version"] = _code_version(form)
        return undecoded_images(rows).map(
            **form.map_options,
            with_indices=True,
            fn_kwargs=fn_kwargs,
            remove_columns=rows.column_names,
            features=form.features,
            num_proc=num_proc,
        )
    if not rows:
        return Dataset.from_dict({name: [] for name in form.features}, form.features)
    # In chunks, which limits the memory for intermediate forms
    chunks = [range(start, min(start + CHUNK, len(rows))) for start in range(0, len(rows), CHUNK)]
    return concatenate_datasets(
        [
            Dataset.from_list([made for i in chunk for made in form.convert(rows[i], i, **fn_kwargs)], form.features)
            for chunk in chunks
        ]
    )


def _code_version(form: RowForm) -> int:
    files = (image_rows.__file__, json_rows.__file__, plain_conversations.__file__, form.code)
    return zlib.crc32(b"".join(Path(file).read_bytes() for file in files))


def _is_image_folder(rows: Any) -> bool:
    return isinstance(rows, Dataset | IterableDataset) and rows.info.builder_name == "imagefolder"


def split_rows(rows: Any, share: float, seed: int, first_index: int = 0) -> tuple[Any, Any]:
    """
    Split a data set in about `1 - share` of the rows, and the others.

    The side of a row depends on the seed and its `row_index`, counted from `first_index`; in a stream on its content.
    """
    if isinstance(rows, IterableDataset):
        sides = {"share": share, "seed": seed}
        return rows.filter(_is_held_back, fn_kwargs=sides | {"wanted": False}), rows.filter(
            _is_held_back, fn_kwargs=sides | {"wanted": True}
        )
    held_back = [_checksum_share(str(index - first_index).encode(), seed) < share for index in rows["row_index"][:]]
    if all(held_back) or not any(held_back):
        raise ValueError(
            f"validation_share {share} of {len(rows)} rows holds back {sum(held_back)}. "
            "Choose a share that leaves rows in both parts."
        )
    return tuple(rows.select([i for i, held in enumerate(held_back) if held is side]) for side in (False, True))


def _checksum_share(content: bytes, seed: int) -> float:
    return zlib.crc32(content, zlib.crc32(str(seed).encode())) / 2**32


def _is_held_back(row: Mapping[str, Any], share: float, seed: int, wanted: bool) -> bool:
    content = json.dumps(row["messages"]).encode() if "messages" in row else b""
    for image in row["images"]:
        content += image["bytes"] or image["path"].encode()
    return (_checksum_share(content, seed) < share) is wanted


def _without_bad_rows(dataset: Dataset, bad_rows: BadRows) -> Dataset:
    bad_rows.total += len(dataset)
    problems = dataset["problem"][:]
    bad = [index for index, problem in enumerate(problems) if problem is not None]
    if bad:
        sources = dataset.select(bad)["source"][:]
        bad_rows.add(zip(sources, [problems[index] for index in bad], strict=True))
        dataset = dataset.select([index for index, problem in enumerate(problems) if problem is None])
    if len(dataset) == 0:
        raise ValueError(f"No row is left of {len(problems)}.")
    return dataset.remove_columns("problem")
