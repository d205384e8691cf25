"""Files of a checkpoint folder: which may be read, where they come from, and writing a folder whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.utils import HFValidationError, validate_repo_id

from modeling_movekd.files import read_json


SAFETENSORS, PICKLES = ("model.safetensors", ".safetensors"), ("pytorch_model.bin", ".bin")
# What a conversion reads beside weights: no code, no optimiser states, no pictures
TEXT_PATTERNS = ["*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]
WEIGHT_PATTERNS = (["model*.safetensors"], ["pytorch_model*.bin"])


def safe_files(folder: str | Path) -> list[Path]:
    """
    The files of a folder, recursively, relative to it and sorted.

    Raises:
        ValueError: for a symbolic link that leads out of the folder (a snapshot in the Hub's cache may point to that
            repository's own blobs) or nowhere, and for anything that is neither file nor folder; naming it.
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
                raise ValueError(f"{path} is a link to {target}, outside of the folder; put the file itself there.")
            if not target.is_file() and not target.is_dir():
                raise ValueError(f"{path} is neither a file nor a folder; remove it.")
            if target.is_file():
                files.append(path.relative_to(folder))
    return sorted(files)


def weight_files(folder: str | Path) -> list[Path]:
    """
    The files of a checkpoint's weights in their order: safetensors if there are any, else `.bin`, one or by the index.
    Empty if there are none.

    Raises:
        ValueError: as [`safe_files`]; for an index that names anything but files beside it; for a file it names that
            is not there.
    """
    folder = Path(folder)
    files = {str(path) for path in safe_files(folder)}
    for single, suffix in (SAFETENSORS, PICKLES):
        if (index := f"{single}.index.json") in files:
            names = read_json(folder / index).get("weight_map")
            if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
                raise ValueError(f"{folder / index} has no `weight_map` of file names; download it again.")
            shards = sorted(set(names.values()))
            if bad := [
                name for name in shards if Path(name).name != name or not name.endswith(suffix) or "\\" in name
            ]:
                raise ValueError(
                    f"{folder / index} names {bad}; only {suffix} files beside it are read. Do not use it."
                )
            if absent := [name for name in shards if name not in files]:
                raise ValueError(f"{folder / index} names {absent}, which are not there; download them.")
            return [folder / name for name in shards]
        if single in files:
            return [folder / single]
    return []


def resolve_source(
    source: str | Path, revision: str | None = None, weights: bool = True, extra_patterns: tuple[str, ...] = ()
) -> Path:
    """
    The folder of a checkpoint: `source` itself, or what is downloaded from the Hub (configuration and tokenizer, and
    unless `weights` is false safetensors, or `.bin` files where there are none).

    Raises:
        ValueError: if `source` is neither a folder nor a Hub id, or has links out of its folder.
    """
    if Path(source).is_dir():
        folder = Path(source)
    else:
        try:
            validate_repo_id(str(source))
        except HFValidationError as error:
            raise ValueError(f"{source} is neither a folder nor the id of a repository on the Hub.") from error
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
    A temporary folder beside `dest` that takes its name when the block ends well and is removed when it does not.

    Raises:
        ValueError: if `dest` exists and is no empty folder.
    """
    dest = Path(dest)
    if dest.exists() and not (dest.is_dir() and not any(dest.iterdir())):
        raise ValueError(f"{dest} exists already; give a new folder, or remove it first.")
    dest.parent.mkdir(parents=True, exist_ok=True)
    temporary = dest.parent / f".{dest.name}.{os.getpid()}.partial"
    temporary.mkdir()
    try:
        yield temporary
        temporary.replace(dest)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
