"""Names of a checkpoint's files, JSON, and files that are written whole or not at all."""

import errno
import glob
import json
import os
import re
import shutil
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors import SafetensorError, safe_open


try:
    import fcntl
except ImportError:  # Windows, where leftovers of killed processes stay
    fcntl = None  # type: ignore[assignment]

CARD_NAME = "README.md"
DISTILLER_NAME = "distiller.safetensors"
TRAINING_FACTS_NAME = "training_facts.json"
CONVERSION_NAME = "conversion.json"
EVALUATION_NAME = "evaluation.json"
HUB_RESULTS_NAME = ".eval_results/evaluation.yaml"
# What a full disk, a quota and a limit on the size of files are to the system
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Fields of a configuration that decide how much is built. There are no more layers than weights, and no size is larger
# than the largest side of a weight.
LAYER_FIELDS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")
SIZE_FIELDS = (
    *("hidden_size", "intermediate_size", "moe_intermediate_size", "vocab_size", "head_dim", "lora_rank"),
    *("num_attention_heads", "num_key_value_heads", "num_experts", "num_local_experts", "num_channels"),
    *("n_embd", "n_inner", "n_head", "d_model", "ffn_dim", "patch_size", "image_size"),
    *("moe_encoder_num_experts", "moe_encoder_lora_rank"),
)
POSITION_FIELDS = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length")
MAX_POSITIONS = 10**8
TILE_FIELDS = ("image_grid_pinpoints", "image_seq_length")
# No value of a configuration is larger. Limits of state space models' time steps may be infinite.
MAX_NUMBER = 10**12
UNLIMITED_FIELDS = ("time_step_limit",)
# safetensors' names for the dtypes of weights. Float8 and integers come from quantization.
WEIGHT_DTYPES = ("F64", "F32", "F16", "BF16")
# Files that earlier versions of this package were writing when they were killed
TEMPORARY_PREFIX = ".tmp-"


def _is_full(error: Exception) -> bool:
    # safetensors and tokenizers have exceptions of their own, which say the number in their text
    found = re.search(r"\(os error (\d+)\)", str(error))
    return (error.errno if isinstance(error, OSError) else int(found[1]) if found else None) in FULL


def _lock(folder: Path) -> int | None:
    """
    Lock a folder until its descriptor is closed or this process ends, however it ends.

    Returns:
        The descriptor, or `None` if another process holds the lock or the file system has none.
    """
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


@contextmanager
def temporary_folder(path: str | Path) -> Iterator[Path]:
    """
    Make a folder beside `path` for what is to become `path`, and remove the folders that killed processes left there.

    Yields:
        The folder. It is removed at the end of the block, and by the next call for `path` if the process is killed.
    """
    path = Path(path)
    for left in path.parent.glob(f".{glob.escape(path.name)}.????????.partial"):
        with suppress(FileNotFoundError):
            if (lock := _lock(left)) is not None:
                shutil.rmtree(left, ignore_errors=True)
                os.close(lock)
    folder, lock = _new_locked_folder(path)
    try:
        yield folder
    except Exception as error:
        if not _is_full(error):
            raise
        raise OSError(f"{path} could not be written: {error}. Free disk space, and run the command again.") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _new_locked_folder(path: Path) -> tuple[Path, int | None]:
    folder = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    folder.mkdir()
    try:
        lock = _lock(folder)
        if folder.is_dir():
            return folder, lock
    except FileNotFoundError:
        pass
    # Another process has taken it for a leftover before it was locked
    return _new_locked_folder(path)


@contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """
    Write a file in a temporary folder beside it, and move it when the block ends well.

    Yields:
        The temporary path. It is removed when the block raises; a file that was at `path` is then left as it was.
    """
    path = Path(path)
    with temporary_folder(path) as folder:
        yield folder / path.name
        (folder / path.name).replace(path)


def read_json(path: str | Path) -> dict[str, Any]:
    """
    Read a JSON object.

    Raises:
        ValueError: if the file is missing, cannot be parsed, or holds something other than an object.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing; is {path.parent} a whole checkpoint?") from error
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or nested too deeply
        raise ValueError(f"{path} is no JSON: {error}. Restore the file.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a JSON object.")
    return content


def check_source(source: str | Path | os.PathLike) -> None:
    """
    Raises:
        ValueError: If a checkpoint is neither a folder nor can be on the Hub, such as a folder whose name is mistyped.
    """
    if Path(source).is_dir():
        return
    try:
        validate_repo_id(str(source))
    except HFValidationError as error:
        raise ValueError(f"{source} is neither a folder nor the id of a repository on the Hub.") from error


@contextmanager
def reading(checkpoint: str | Path | os.PathLike) -> Iterator[None]:
    """Turn what libraries raise for damaged files into a `ValueError` that names the checkpoint."""
    try:
        yield
    except (ValueError, OSError, ImportError, MemoryError):
        raise
    except Exception as error:
        if _is_full(error):
            raise
        # transformers, tokenizers and safetensors raise nearly any exception for a damaged file.
        raise ValueError(
            f"{checkpoint} cannot be read ({type(error).__name__}: {error}). Restore its files, or download it again."
        ) from error


def save_text(text: str, path: str | Path) -> None:
    """Write a text file whole or not at all."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_json(content: dict[str, Any], path: str | Path) -> None:
    """Write a JSON object whole or not at all; values that JSON does not know are written as strings."""
    save_text(json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n", path)


def weight_shapes(paths: Iterable[str | Path]) -> list[tuple[int, ...]]:
    """
    The shapes of all tensors in safetensors files. Only their headers are read.

    Raises:
        ValueError: If a file cannot be read, or a tensor is not of a dtype that weights have.
    """
    shapes = []
    for path in paths:
        try:
            with safe_open(path, "pt") as file:
                tensors = {key: file.get_slice(key) for key in file.keys()}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read as safetensors: {error}. Download it again.") from error
        for key, tensor in tensors.items():
            if tensor.get_dtype() not in WEIGHT_DTYPES:
                raise ValueError(
                    f"`{key}` of {path} is {tensor.get_dtype()}; weights are {', '.join(WEIGHT_DTYPES)}. Save the "
                    "model again, not quantized."
                )
            shapes.append(tuple(tensor.get_shape()))
    return shapes


def check_config_size(config: Mapping[str, Any], shapes: Collection[Sequence[int]], name: str | os.PathLike) -> None:
    """
    Check that a configuration asks for nothing larger than its weights, before anything is built of it, and that its
    numbers are finite.

    A configuration may come from a stranger, and a model of a billion layers is built for days.

    Args:
        config (`Mapping`): Content of `config.json`.
        shapes (`Collection`): Shapes of the weights.
        name (`str` or `os.PathLike`): Name of the checkpoint, for the error.
    """
    largest = max((side for shape in shapes for side in shape), default=0)
    limits = dict.fromkeys(LAYER_FIELDS, len(shapes)) | dict.fromkeys(SIZE_FIELDS, largest)
    limits |= dict.fromkeys((*POSITION_FIELDS, *TILE_FIELDS), MAX_POSITIONS)
    if isinstance(patch := config.get("patch_size"), int) and patch > 0:
        limits["image_size"] = patch * int(largest**0.5)  # the position embedding has a row for each patch
    for field, value in config.items():
        values = list(_flatten(value))
        for part in values:
            if isinstance(part, Mapping):
                check_config_size(part, shapes, name)
        values = [part for part in values if part is not None and not isinstance(part, Mapping)]
        if field in limits:
            if any(type(size) is not int or "expert" not in field and size < 1 for size in values):
                raise ValueError(f"`{field}` of {name} is {value!r}, expected a positive number. Restore config.json.")
            if max(values, default=0) > limits[field]:
                raise ValueError(
                    f"`{field}` of {name} is {value}, but its weights hold at most {limits[field]}. Restore "
                    "config.json, or download the weights again."
                )
        elif field not in UNLIMITED_FIELDS:
            numbers = [number for number in values if isinstance(number, int | float)]
            if not all(abs(number) <= MAX_NUMBER for number in numbers):  # NaN is not
                raise ValueError(
                    f"`{field}` of {name} is {value!r}, expected numbers up to {MAX_NUMBER}. Restore config.json."
                )


def _flatten(value: Any) -> Iterator[Any]:
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, list | tuple):
            waiting += part
        else:
            yield part


def cached_commit(repo_id: str, revision: str = "main", repo_type: str = "model") -> str | None:
    """The commit that a branch or tag of a Hub repository stands for in the local cache. Nothing is asked online."""
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type=repo_type)
    reference = folder / "refs" / revision
    return reference.read_text(encoding="utf-8").strip() if reference.is_file() else None
