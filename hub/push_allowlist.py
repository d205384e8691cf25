"""The files of a folder that may be published, and checks of their content."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import modeling_movekd
from hub.card_facts import PICTURE
from hub.files import safe_files, weight_files
from modeling_movekd import MoveKDForConditionalGeneration, MoveKDVisionModel
from modeling_movekd.files import HUB_RESULTS_NAME, read_json


PACKAGE = Path(modeling_movekd.__file__).parent
# The distiller is published because a run is continued with it
WEIGHTS = re.compile(r"(model(-\d{5}-of-\d{5})?|distiller)\.safetensors|model\.safetensors\.index\.json")
TEXTS = {"config.json", "generation_config.json", "training_facts.json", "evaluation.json", "merge_report.json"}
TEXTS |= {"processor_config.json", "preprocessor_config.json", "chat_template.jinja", "chat_template.json"}
TEXTS |= {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"}
TEXTS |= {"vocab.txt", "merges.txt", HUB_RESULTS_NAME}
# Results by others, which another push leaves as they are
HUB_RESULTS = re.compile(r"\.eval_results/[\w.-]+\.ya?ml")
CARD = {"README.md", "LICENSE", "LICENSE.txt", "NOTICE"}
CODE = {path.name for path in PACKAGE.glob("*_movekd.py")}
TOKENIZER_MODEL = "tokenizer.model"
# The `auto_map` of each model type. Exports are models of transformers and have none.
MODEL_TYPES: dict[str, dict[str, str]] = {
    "movekd": MoveKDForConditionalGeneration._auto_map,
    "movekd_vision": MoveKDVisionModel._auto_map,
    "clip_vision_model": {},
    "llava": {},
    "llava_next": {},
}
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
SPACE_SUFFIXES = {".py", ".md", ".txt", ".css", ".js", ".html", ".json", ".yaml", ".png", ".jpg", ".jpeg", ".webp"}
SPACE_SUFFIXES |= {".svg"}


def is_ours(name: str) -> bool:
    """Whether a file of this name belongs to a checkpoint, so that another push replaces or removes it."""
    return WEIGHTS.fullmatch(name) is not None or name in TEXTS | CODE | {TOKENIZER_MODEL}


def checkpoint_files(folder: Path, token: str | None = None) -> tuple[list[str], list[str]]:
    """
    The files of a checkpoint that are published, and those that are not, relative to the folder and sorted.

    Refused are links out of the folder, code and an `auto_map` that are not this package's, weights that are missing,
    pickled or stored twice, and text with an access token: `token`, or anything that looks like one.
    """
    found = [path.as_posix() for path in safe_files(folder)]
    for name in found:
        if name.endswith(".py"):
            _check_code(folder, name)
    weights = weight_files(folder)
    if not weights or weights[0].suffix != ".safetensors":
        held = [name for name in found if name.endswith(PICKLES)]
        raise ValueError(
            f"{folder} has no weights as safetensors{f', only pickles: {held}' if held else ''}. Pickles can hold "
            "code and are not published. Save the model with `save_pretrained`."
        )
    if "model.safetensors" in found and weights != [folder / "model.safetensors"]:
        raise ValueError(
            f"{folder} has both model.safetensors and model.safetensors.index.json of other files. Remove the older "
            "one."
        )
    own = {path.name for path in weights} | {"model.safetensors.index.json", "distiller.safetensors"}
    allowed = own | TEXTS | CARD | CODE | {TOKENIZER_MODEL}
    chosen = [name for name in found if name in allowed or HUB_RESULTS.fullmatch(name) or PICTURE.fullmatch(name)]
    _check_auto_maps(folder, chosen)
    _check_tokens(folder, chosen, token)
    return chosen, [name for name in found if name not in chosen]


def space_files(folder: Path, token: str | None = None) -> tuple[list[str], list[str]]:
    """The files of a Space that are published, and those that are not."""
    if not (folder / "README.md").is_file():
        raise ValueError(f"{folder} has no README.md, which every Space needs. Add it, with an `sdk` in its metadata.")
    found = safe_files(folder)
    hidden = [path for path in found if any(part.startswith((".", "__pycache__")) for part in path.parts)]
    chosen = [path.as_posix() for path in found if path not in hidden and path.suffix in SPACE_SUFFIXES]
    _check_tokens(folder, chosen, token)
    return chosen, [path.as_posix() for path in found if path.as_posix() not in chosen]


def _check_code(folder: Path, name: str) -> None:
    ours = PACKAGE / Path(name).name
    if not ours.is_file():
        raise ValueError(
            f"{folder / name} is code that is not of this package, and everybody who loads the model would run it. "
            "Remove it."
        )
    if ours.read_bytes() != (folder / name).read_bytes():
        raise ValueError(
            f"{folder / name} differs from this package's {ours.name} (movekd {modeling_movekd.__version__}). Save "
            "the checkpoint again with this version (`from_pretrained`, `save_pretrained`), or push with the version "
            "that wrote it."
        )


def _references(content: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every entry that names code to run: its path in the file, and its value."""
    if isinstance(content, dict):
        for key, value in content.items():
            if key in ("auto_map", "custom_pipelines"):
                yield f"{path}{key}", value
            else:
                yield from _references(value, f"{path}{key}.")
    elif isinstance(content, list):
        for value in content:
            yield from _references(value, path)


def _check_auto_maps(folder: Path, names: list[str]) -> None:
    config = read_json(folder / "config.json")
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ValueError(
            f"{folder / 'config.json'} is of a {model_type!r} model; only {[*MODEL_TYPES]} are published. Convert it "
            "with `python hub/convert.py`."
        )
    expected = MODEL_TYPES[model_type]
    for name in names:
        if not name.endswith(".json") or name.endswith((".index.json", "tokenizer.json", "vocab.json")):
            continue
        for entry, value in _references(read_json(folder / name)):
            if (name, entry) != ("config.json", "auto_map") or value != expected:
                raise ValueError(
                    f"`{entry}` of {folder / name} is {value}, which names code to run; only {expected or 'none'} "
                    "is this package's. Remove it, or save the checkpoint again."
                )
    if expected and "auto_map" not in config:
        raise ValueError(f"{folder / 'config.json'} has no `auto_map`, so it cannot be loaded. Save the model again.")


def _check_tokens(folder: Path, names: list[str], token: str | None) -> None:
    for name in names:
        if name.endswith((".safetensors", ".model", ".png", ".jpg", ".jpeg", ".webp")):
            continue
        text = (folder / name).read_text(encoding="utf-8", errors="replace")
        if TOKEN.search(text) or (token and token in text):
            raise ValueError(f"{folder / name} holds an access token. Remove it, and revoke it if others saw it.")
