"""Checks of the options of `hub/export.py`. Nothing here imports torch, so that arguments are checked at once."""

from collections.abc import Sequence
from pathlib import Path


FORMS = ("encoder", "dense", "clip", "llava", "gguf", "onnx", "merged")
MEASURED_FORMS = ("dense", "onnx", "merged")
DTYPE_NAMES = ("float32", "bfloat16", "float16")


def check_options(
    form: str, dtype: str | None, images: Sequence[str | Path], rank: int | None, cls_last: bool
) -> None:
    """Refuse options of [`~hub.export_forms.export`] that are wrong or have no effect on the form."""
    if form not in FORMS:
        raise ValueError(f"`form` is {form!r}; it must be one of {', '.join(FORMS)}.")
    if dtype is not None and dtype not in DTYPE_NAMES:
        raise ValueError(f"`dtype` is {dtype!r}; it must be one of {', '.join(DTYPE_NAMES)}.")
    if images and form not in MEASURED_FORMS:
        raise ValueError(f"`images` are for the forms {', '.join(MEASURED_FORMS)}; the form is `{form}`.")
    if rank is not None and form != "merged":
        raise ValueError(f"`rank` is for the form `merged`; the form is `{form}`.")
    if cls_last and form != "gguf":
        raise ValueError(f"`cls_last` is for the form `gguf`; the form is `{form}`.")
