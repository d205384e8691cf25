"""Checkpoint folders: which files may be read, how they are downloaded, and how a folder is written."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import snapshot_download

from modeling_movekd.files import check_source, read_json, temporary_folder


SAFETENSORS, PICKLES = ("model.safetensors", ".safetensors"), ("pytorch_model.bin", ".bin")
# The files beside the weights: no code, no optimizer states
TEXT_PATTERNS = ["*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]
WEIGHT_PATTERNS = (["model*.safetensors"], ["pytorch_model*.bin"])


def safe_files(folder: str | Path) -> list[Path]:
    """
    The files of a folder and its subfolders, relative to the folder and sorted.

    A symbolic link out of the folder is refused, except in the Hub's cache from a snapshot to the blobs of its
    repository.
    """
    folder = Path(folder)
    roots = [folder.resolve()]
    if folder.parent.name == "snapshots":
        roots.append((folder.parent.parent / "blobs").resolve())
    files = []
    for directory, subfolders, names in os.walk(folder):
        for name in sorted(subfolders + names):
            path = Path(directory) / name
            target = path.resolve()
            if path.is_symlink() and not any(target.is_relative_to(root) for root in roots):
                raise ValueError(f"{path} is a link to {target}, outside of the folder. Replace it with the file.")
            if not target.is_file() and not target.is_dir():
                raise ValueError(f"{path} is neither a file nor a folder. Remove it.")
            if target.is_file():
                files.append(path.relative_to(folder))
    return sorted(files)


def weight_files(folder: str | Path) -> list[Path]:
    """
    The weight files of a checkpoint: safetensors if there are any, else `.bin`; a single file, or those of the index.

    Files may come from a stranger, so an index may only name files beside it.
    """
    folder = Path(folder)
    files = {str(path) for path in safe_files(folder)}
    for single, suffix in (SAFETENSORS, PICKLES):
        if (index := f"{single}.index.json") in files:
            names = read_json(folder / index).get("weight_map")
            if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
                raise ValueError(f"{folder / index} has no `weight_map` of file names. Download it again.")
            shards = sorted(set(names.values()))
            if bad := [
                name for name in shards if Path(name).name != name or not name.endswith(suffix) or "\\" in name
            ]:
                raise ValueError(
                    f"{folder / index} names {bad}; only {suffix} files beside it are read. Do not use it."
                )
            if absent := [name for name in shards if name not in files]:
                raise ValueError(f"{folder / index} names {absent}, which are not there. Download them.")
            return [folder / name for name in shards]
        if single in files:
            return [folder / single]
    return []


def resolve_source(
    source: str | Path, revision: str | None = None, weights: bool = True, extra_patterns: tuple[str, ...] = ()
) -> Path:
    """
    The folder of a checkpoint: `source` itself, or a download from the Hub.

    A download has the configuration and the tokenizer, and with `weights` the safetensors, or `.bin` files where there
    are none.
    """
    check_source(source)
    if Path(source).is_dir():
        folder = Path(source)
    else:
        folder = Path(snapshot_download(str(source), revision=revision, allow_patterns=TEXT_PATTERNS))
        for patterns in WEIGHT_PATTERNS if weights else ():
            wanted = [*patterns, *extra_patterns]
            folder = Path(snapshot_download(str(source), revision=revision, allow_patterns=TEXT_PATTERNS + wanted))
            if weight_files(folder):
                break
    safe_files(folder)
    return folder


@contextmanager
def new_folder(dest: str | Path) -> Iterator[Path]:
    """
    Write a folder under a temporary name beside `dest`, and rename it when the block ends well.

    Yields:
        The temporary folder. It is removed when the block raises, or by the next call if the process is killed.
    """
    dest = Path(dest)
    if dest.exists() and not (dest.is_dir() and not any(dest.iterdir())):
        raise ValueError(f"{dest} exists already. Give a new folder, or remove it first.")
    dest.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(dest) as temporary:
        yield temporary
        temporary.replace(dest)
