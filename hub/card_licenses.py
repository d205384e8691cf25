"""The license of a trained model, which follows from the licenses of its base models."""

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any


# Licenses of well-known base models, as their cards say. The first match counts.
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
# From the least to the most demanding
PERMISSIVE = ("mit", "bsd-2-clause", "bsd-3-clause", "apache-2.0")
# Identifiers that the Hub knows. Any other license becomes `other` with a `license_name`.
HUB_LICENSES = {
    *PERMISSIVE,
    *("llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "gemma", "openrail", "bigscience-openrail-m"),
    *("cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0"),
    *("gpl-3.0", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "unlicense", "isc", "ms-pl"),
}


def check_license(name: str) -> str:
    """The license's identifier in lower case."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}", name):
        raise ValueError(f"`license` is {name!r}, expected an identifier such as 'llama2' or 'apache-2.0'.")
    return name.lower()


def model_license(base_model: Mapping[str, Any]) -> str | None:
    """The license of a base model, from its own card or else by its Hub id; `None` if it is not known."""
    try:
        return check_license(base_model["license"])
    except (KeyError, ValueError):
        name = str(base_model.get("model"))
        return next((value for pattern, value in KNOWN_LICENSES.items() if fnmatchcase(name, pattern)), None)


def derive_license(base_models: Sequence[Mapping[str, Any]]) -> tuple[str | None, str]:
    """
    The license of a model made from these models, and the reason for it, as the end of a sentence.

    A license that restricts use passes on; of permissive licenses the most demanding is kept. If one is not known, or
    two different ones restrict use, the owner must decide: the license is `None`.
    """
    licenses = [model_license(model) for model in base_models]
    if not licenses:
        return None, "the base models are not recorded"
    if None in licenses:
        return None, "the license of a base model is not known"
    restricting = sorted({name for name in licenses if name and name not in PERMISSIVE})
    if len(restricting) > 1:
        return None, f"the base models have different licenses that both restrict use ({', '.join(restricting)})"
    if restricting:
        return restricting[0], "which passes on from the base models"
    return max((name for name in licenses if name), key=PERMISSIVE.index), "as the base models"
