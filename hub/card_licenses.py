"""The licence of a trained model, as the licences of the models it was made from decide it."""

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any


# Licences of well-known base models whose cards say it in the metadata or the text. First match counts.
KNOWN_LICENSES = {
    "lmsys/vicuna-*-v1.5*": "llama2",
    "liuhaotian/llava-v1.5-*": "llama2",
    "llava-hf/llava-1.5-*": "llama2",
    "meta-llama/Llama-2-*": "llama2",
    "meta-llama/Meta-Llama-3-*": "llama3",
    "meta-llama/*Llama-3.1-*": "llama3.1",
    "meta-llama/Llama-3.2-*": "llama3.2",
    "meta-llama/Llama-3.3-*": "llama3.3",
    "mistralai/Mistral-7B-*": "apache-2.0",
    "HuggingFaceTB/SmolLM2-*": "apache-2.0",
    "Qwen/Qwen3-*": "apache-2.0",
    "openai/clip-vit-*": "mit",
}
# From the least to the most demanding: of several, the last one is kept
PERMISSIVE = ("mit", "bsd-2-clause", "bsd-3-clause", "apache-2.0")
# Those the Hub knows by these names; any other is written as `other` with its name beside it
HUB_LICENSES = {
    *PERMISSIVE,
    *("llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "gemma", "openrail", "bigscience-openrail-m"),
    *("cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0"),
    *("gpl-3.0", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "unlicense", "isc", "ms-pl"),
}


def check_license(name: str) -> str:
    """
    The licence's identifier, in lower case.

    Raises:
        ValueError: if it is no identifier, as `apache-2.0`.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}", name):
        raise ValueError(f"`license` is {name!r}, expected an identifier such as 'llama2' or 'apache-2.0'.")
    return name.lower()


def model_license(base_model: Mapping[str, Any]) -> str | None:
    """The licence of a base model: as noted from its own card, else as known of its Hub id; `None` if neither."""
    try:
        return check_license(base_model["license"])
    except (KeyError, ValueError):
        name = str(base_model.get("model"))
        return next((value for pattern, value in KNOWN_LICENSES.items() if fnmatchcase(name, pattern)), None)


def derive_license(base_models: Sequence[Mapping[str, Any]]) -> tuple[str | None, str]:
    """
    The licence of a model made from these, and why, as the end of a sentence.

    A licence that restricts use passes on; of permissive ones the most demanding is kept. Where a base model's is not
    known, or two differ that both restrict, there is none: that is for the owner to decide.
    """
    licenses = [model_license(model) for model in base_models]
    if not licenses:
        return None, "the base models are not recorded"
    if None in licenses:
        return None, "the licence of a base model is not known"
    restricting = sorted({name for name in licenses if name and name not in PERMISSIVE})
    if len(restricting) > 1:
        return None, f"the base models are under different licences that both restrict use ({', '.join(restricting)})"
    if restricting:
        return restricting[0], "as the base models' licence passes on"
    return max((name for name in licenses if name), key=PERMISSIVE.index), "as the base models"
