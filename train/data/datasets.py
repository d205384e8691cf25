"""Training data of every source in one form of row; mixtures, streams, and rows held back for validation."""

import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import (
    Dataset,
    IterableDataset,
    concatenate_datasets,
    interleave_datasets,
)

from train.config import DataArguments
from train.data import conversations
from train.data.bad_rows import BadRows
from train.data.conversations import FEATURES, convert_row
from train.data.sources import open_rows, undecoded_images


CHUNK = 10_000


@dataclass
class DataSource:
    """One data set of a mixture.

    Args:
        name: LLaVA file (`.json`, `.jsonl`), `.parquet` file or folder of them, folder written by
            `Dataset.save_to_disk`, or data set id of the Hub.
        weight: share of the mixture, relative to the other weights. Give one for every data set, or for none.
        image_folder: folder that its image paths start from.
        subset: configuration of a Hub data set that has several.
        split: split to train on.
    """

    name: str
    weight: float | None = None
    image_folder: str | None = None
    subset: str | None = None
    split: str | None = None


def data_sources(data_args: DataArguments) -> list[DataSource]:
    """The data sets that `dataset_name` names, in order.

    Raises:
        ValueError: for an unknown or missing key, or weights that are not positive or not given throughout.
    """
    names: Any = data_args.dataset_name
    sources = []
    for name in [names] if isinstance(names, str | os.PathLike | Mapping) else names:
        keys: dict[str, Any] = dict(name) if isinstance(name, Mapping) else {"name": str(name)}
        allowed = list(DataSource.__dataclass_fields__)
        if "name" not in keys or not set(keys) <= set(allowed):
            raise ValueError(
                f"A data set of dataset_name has the keys {list(keys)}: 'name' must, {allowed} may be there."
            )
        source = DataSource(**keys)
        source.image_folder = source.image_folder or data_args.image_folder
        source.split = source.split or data_args.dataset_train_split
        sources.append(source)
    weights = [source.weight for source in sources if source.weight is not None]
    if (weights and len(weights) < len(sources)) or any(weight <= 0 for weight in weights):
        shown = [source.weight for source in sources]
        raise ValueError(
            f"The weights of dataset_name are {shown}: give every data set a positive one, or none of them."
        )
    return sources


def load_train_and_validation(
    data_args: DataArguments,
    bad_rows: BadRows,
    seed: int = 0,
    evaluate: bool = False,
    num_proc: int | None = None,
) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]:
    """The rows to train on and those to evaluate on, of all data sets of the mixture.

    Without weights the data sets are put one behind the other. With weights each next row is drawn from a data set by
    its weight, in the order of that data set, until one (`first_exhausted`) or all of them (`all_exhausted`, the
    shorter ones repeated) are used up. A stream of training rows has no end, so that no process runs out of rows
    before the others: where it is used up it begins again, in the same order, with weights each data set by itself.
    The order depends on the seed alone. A row is held back for validation by a checksum of its place in its data set
    (in a stream: of its content) and the seed, whatever else is in the mixture.

    Args:
        data_args: what to load.
        bad_rows: counts the rows that cannot be used.
        seed: seed of mixture, split, and of the order of a stream.
        evaluate: whether the run evaluates.
        num_proc: processes that convert the rows of Parquet and saved data sets.

    Returns:
        Rows as of [`load_conversations`]; in a stream of training rows also bad ones with their `problem`, which the
        collator passes on. `None` instead of the second without `evaluate`.

    Raises:
        ValueError: as [`load_conversations`], for a split that leaves either side empty, or rows held back for an
            evaluation that does not take place.
    """
    share = data_args.validation_share
    if share and not evaluate:
        raise ValueError(f"validation_share {share} holds rows back, but eval_strategy is 'no': set one or the other.")
    sources = data_sources(data_args)
    train, validation = [], []
    for number, source in enumerate(sources):
        first_index = bad_rows.total
        rows = _load(sources, number, source.split, data_args, bad_rows, num_proc)
        if evaluate and share:
            rows, held_back = split_rows(rows, share, seed, first_index)
            validation.append(held_back)
        elif evaluate:
            validation.append(_load(sources, number, data_args.dataset_test_split, data_args, bad_rows, num_proc))
        train.append(rows)
    weights = [source.weight for source in sources if source.weight is not None]
    if len(train) > 1 and weights:
        mixture = interleave_datasets(
            # A stream's mixture would else end with its shortest part, and begin the others again at the same rows
            [_endless(rows, data_args.shuffle_buffer_size, seed) for rows in train] if data_args.streaming else train,
            probabilities=[weight / sum(weights) for weight in weights],
            seed=seed,
            stopping_strategy=data_args.mixture_stopping_strategy,
        )
    else:
        mixture = train[0] if len(train) == 1 else concatenate_datasets(train)
        if data_args.streaming:
            mixture = _endless(mixture, data_args.shuffle_buffer_size, seed)
    if not validation:
        return mixture, None
    held_back = concatenate_datasets(validation)
    if data_args.streaming:
        # In one piece: pieces are dealt to the processes, which would then evaluate different numbers of batches
        held_back = IterableDataset.from_generator(_rows_of, features=FEATURES, gen_kwargs={"stream": held_back})
    return mixture, held_back


def _load(
    sources: Sequence[DataSource],
    number: int,
    split: str | None,
    data_args: DataArguments,
    bad_rows: BadRows,
    num_proc: int | None,
) -> Any:
    source, split = sources[number], split or "train"
    names = [_report_name(each.name, split, each.subset) for each in sources]
    alone = names.count(names[number]) == 1
    return load_conversations(
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
    """The stream shuffled, and begun again at its end."""
    if buffer_size > 1:
        stream = stream.shuffle(seed=seed, buffer_size=buffer_size)
    # In front of the repetition the buffer would mix the passes, and a short run see rows twice and others never
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
    """Read a data set and give its usable rows as messages and undecoded images. No image file is opened.

    Every turn with an `<image>` is treated as the authors do: the placeholders are removed, the text is stripped, and
    the images stand in front. A leading answer is dropped. Rows whose placeholders and images disagree, and malformed
    ones, are skipped, counted and reported by place and reason.

    Args:
        source: a LLaVA file (`.json`, `.jsonl`), a `.parquet` file or a folder of them, a folder written by
            `Dataset.save_to_disk`, a data set id of the Hub, a `datasets.Dataset`, or a list of rows. Rows are LLaVA's
            (`conversations`, and `image` as path, picture or list of either) or TRL's (`messages` or
            `prompt`/`completion`, and `images`).
        image_folder: folder that relative image paths start from (default: the folder of a LLaVA file). No path may
            lead out of it. That is a check of the path as written, which is what the data decides: links that the
            folder's owner has put into it are followed, as image folders are often made of them.
        split: split of a Hub data set, Parquet folder or saved `DatasetDict`; others have `train` alone.
        max_bad_row_share: the largest share of rows that may be skipped, between 0 and 1. Not used with `bad_rows`.
        num_proc: processes that convert the rows of a `datasets.Dataset`.
        subset: configuration of a Hub data set that has several.
        streaming: read rows when they are asked for; bad ones are then passed on with their `problem`.
        bad_rows: counts the bad rows, over several calls and over a run. Its `total` grows by the rows read here.
        name: what a report calls the data set, different for every call with one `bad_rows`; by default its file,
            folder or id, with subset and split.

    Returns:
        `Dataset`, or `IterableDataset` if `streaming`, with the columns `messages` (role, and content as a list of
        image and text parts), `images` (a list of `{"bytes", "path"}`, empty for a text-only row), `row_index` (unique
        over all calls with one `bad_rows`, for one data set the position in it; in a stream the position in its
        shard), `source` (what to call the row in a report) and `modality_length` (words of all turns as written,
        negative for a text-only row; what `ModalityLengthGroupedSampler` takes). A stream also has `problem`.

    Raises:
        ValueError: if too many of the rows are bad, no row is left, the source cannot be read or has no such split, or
            an image path leads out of the image folder.
    """
    bad_rows = BadRows(max_share=max_bad_row_share) if bad_rows is None else bad_rows
    path = Path(source) if isinstance(source, str | os.PathLike) else None
    if path is not None and path.suffix in (".json", ".jsonl"):
        image_folder = path.parent if image_folder is None else image_folder
    folder = None if image_folder is None else os.path.abspath(image_folder)
    if folder is not None and not os.path.isdir(folder):
        raise ValueError(f"There is no image folder {folder}.")
    rows = open_rows(source, split, subset, streaming)
    name = _report_name(source, split, subset) if name is None else name
    place: dict[str, Any] = {"folder": folder, "name": name, "offset": bad_rows.total}
    if isinstance(rows, IterableDataset):
        names = rows.column_names or list(next(iter(rows), {}))
        # Streamed from several shards, a row's number is its place in its shard
        place["sharded"] = rows.num_shards > 1
        stream = (rows.decode(False) if rows.features else rows).map(
            convert_row, with_indices=True, fn_kwargs=place, remove_columns=names, features=FEATURES
        )
        if next(iter(stream), None) is None:
            raise ValueError(f"{name or 'The data set'} has no row.")
        return stream
    if isinstance(rows, Dataset):
        # The conversion is cached under the name of its function; another version of the file is another function
        place["version"] = zlib.crc32(Path(conversations.__file__).read_bytes())
        converted = undecoded_images(rows).map(
            convert_row,
            with_indices=True,
            fn_kwargs=place,
            remove_columns=rows.column_names,
            features=FEATURES,
            num_proc=num_proc,
            desc="Reading conversations",
        )
    else:
        if not rows:
            raise ValueError(f"{name or 'The data set'} has no row.")
        # In chunks, so that the rows are not held in three forms at a time
        chunks = [range(start, min(start + CHUNK, len(rows))) for start in range(0, len(rows), CHUNK)]
        converted = concatenate_datasets(
            [Dataset.from_list([convert_row(rows[i], i, **place) for i in chunk], FEATURES) for chunk in chunks]
        )
    if streaming:
        return converted.to_iterable_dataset()
    return _without_bad_rows(converted, bad_rows)


def split_rows(rows: Any, share: float, seed: int, first_index: int = 0) -> tuple[Any, Any]:
    """Two parts of a data set: about `1 - share` of the rows, and the others.

    On which side a row comes depends on the seed and on its `row_index`, counted from `first_index`, or, in a stream,
    on its content alone.

    Raises:
        ValueError: if either part is empty (in a stream this is not known).
    """
    if isinstance(rows, IterableDataset):
        sides = {"share": share, "seed": seed}
        return rows.filter(_is_held_back, fn_kwargs=sides | {"wanted": False}), rows.filter(
            _is_held_back, fn_kwargs=sides | {"wanted": True}
        )
    held_back = [_checksum_share(str(index - first_index).encode(), seed) < share for index in rows["row_index"][:]]
    if all(held_back) or not any(held_back):
        raise ValueError(
            f"validation_share {share} of {len(rows)} rows holds back {sum(held_back)}: both parts need rows."
        )
    return tuple(rows.select([i for i, held in enumerate(held_back) if held is side]) for side in (False, True))


def _checksum_share(content: bytes, seed: int) -> float:
    return zlib.crc32(content, zlib.crc32(str(seed).encode())) / 2**32


def _is_held_back(row: Mapping[str, Any], share: float, seed: int, wanted: bool) -> bool:
    content = json.dumps(row["messages"]).encode()
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
