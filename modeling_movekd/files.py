"""Names of a checkpoint's files, JSON, and files that are written whole or not at all."""

import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name


CARD_NAME = "README.md"
DISTILLER_NAME = "distiller.safetensors"
TRAINING_FACTS_NAME = "training_facts.json"
CONVERSION_NAME = "conversion.json"
EVALUATION_NAME = "evaluation.json"
# Files that are being written; the ending of the final name is kept, since libraries choose a format by it.
TEMPORARY_PREFIX = ".tmp-"


@contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """
    Write a file under a temporary name beside it, and rename it when the block ends well.

    Yields:
        The temporary path. It is removed when the block raises; a file that was at `path` is then left as it was.
    """
    path = Path(path)
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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
    except ValueError as error:  # no JSON, or no UTF-8
        raise ValueError(f"{path} is no JSON: {error}. Restore the file.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a JSON object.")
    return content


def save_json(content: dict[str, Any], path: str | Path) -> None:
    """Write a JSON object whole or not at all; values that JSON does not know are written as strings."""
    with new_file(path) as temporary:
        text = json.dumps(content, indent=2, ensure_ascii=False, default=str)
        temporary.write_text(f"{text}\n", encoding="utf-8")


def cached_commit(repo_id: str, revision: str = "main", repo_type: str = "model") -> str | None:
    """The commit that a branch or tag of a Hub repository stands for in the local cache. Nothing is asked online."""
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type=repo_type)
    reference = folder / "refs" / revision
    return reference.read_text(encoding="utf-8").strip() if reference.is_file() else None
