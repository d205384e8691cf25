"""Converts the rows of a JSON file once, to Arrow files in the cache of `datasets`, which later starts map."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash
from datasets import ArrowBasedBuilder, Dataset, DatasetInfo, Features, SplitGenerator, config
from datasets.builder import Key
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher

from train.data.json_rows import read_rows


# Opening a file touches each batch of rows in it, and the system maps much around that
ROWS_WRITTEN = 10_000
Convert = Callable[[list[Any], int], pa.Table]


class _JsonBuilder(ArrowBasedBuilder):
    """Converts a file. `datasets` lets one process write, in a temporary folder, and the others wait."""

    DEFAULT_WRITER_BATCH_SIZE = ROWS_WRITTEN

    def __init__(self, path: Path, convert: Convert, features: Features, key: str) -> None:
        self.path, self.convert, self.features = path, convert, features
        super().__init__(dataset_name="movekd_rows", hash=key)

    def _info(self) -> DatasetInfo:
        return DatasetInfo(features=self.features)

    def _split_generators(self, dl_manager: Any) -> list[SplitGenerator]:
        return [SplitGenerator(name="train")]

    def _generate_tables(self) -> Iterator[tuple[Key, pa.Table]]:
        count, tables = 0, list[pa.Table]()
        for rows in read_rows(self.path):
            tables.append(self.convert(rows, count))
            count += len(rows)
            if sum(map(len, tables)) >= ROWS_WRITTEN:
                yield Key(0, count), pa.concat_tables(tables)
                tables = []
        if tables:
            yield Key(0, count), pa.concat_tables(tables)
        self.info.description = str(count)  # the only place for it that `datasets` keeps


def load_json_rows(path: Path, convert: Convert, features: Features, settings: Any) -> tuple[Dataset, int]:
    """
    The converted rows of a `.json` or `.jsonl` file, as memory-mapped Arrow files.

    Args:
        path (`Path`): The file.
        convert (`Callable`): Makes a table of a list of rows and the position of the first.
        features (`Features`): The columns of the tables.
        settings: What the result depends on, besides the file's content.

    Returns:
        The data set, and the number of rows in the file.

    Raises:
        ValueError: if the file is not valid, or `convert` refuses it.
        OSError: if the cache cannot be written.
    """
    try:
        builder = _JsonBuilder(path, convert, features, Hasher.hash([_content_hash(path), settings]))
        builder.download_and_prepare()
    except (DatasetGenerationError, OSError) as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else error
        if isinstance(cause, ValueError):
            raise cause from None
        if not isinstance(cause, OSError):
            raise
        raise OSError(
            f"The rows of {path} cannot be converted in {config.HF_DATASETS_CACHE}: {cause}. Set HF_DATASETS_CACHE to "
            "a folder with space that can be written."
        ) from cause
    count = int(builder.info.description)
    if not builder.info.splits["train"].num_examples:  # of which `datasets` makes no data set
        return Dataset.from_dict({name: [] for name in features}, features), count
    return builder.as_dataset(split="train"), count


def _content_hash(path: Path) -> str:
    """A hash of the whole file: 0.1 s of CPU for a gigabyte. Size and time of change may stay when a file changes."""
    found = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            found.update(block)
    return found.hexdigest()
