"""The presets of the method as one table."""

from typing import Any

from transformers.hf_argparser import HfArg


# The options that tell the forms of the method apart. `paper` follows the paper's text, `released` the original code.
# `student_heads` is this project's form: heads on the student's features predict the teachers' whitened features.
PRESET_NAMES = ("paper", "released", "student_heads")
PRESET_TABLE: dict[str, tuple[Any, Any, Any]] = {
    "router_gradient": ("straight_through", "none", "straight_through"),
    "expert_init": ("zero", "kaiming", "zero"),
    "expert_bias": (False, True, False),
    "head_side": ("teacher", "teacher", "student"),
    "head_form": ("mlp", "mlp", "unit_linear"),
    "feature_normalization": ("none", "none", "whiten"),
    "grid_matching": ("learned", "learned", "resample"),
    "distillation_loss": ("mse", "mse", "mse"),
    "cosine_share": (0.9, 0.9, 0.9),
    "token_weighting": ("cls_attention", "released", "none"),
    "teacher_weighting": ("cls_similarity", "released", "equal"),
    "clip_share": (0.8, 0.8, 0.2),
    "teacher_dropping": (0.0, 0.0, 0.0),
    "lambda_kd": (0.5, 0.5, 4.0),
    "balance_form": ("per_layer", "pooled", "per_layer"),
    "lambda_balance": (0.01, 0.01, 0.01),
    "distill_text_only_rows": (False, True, False),
    "geometry": ("shared", "per_teacher", "shared"),
    "cut_tower": (True, False, True),
}
PRESETS: dict[str, dict[str, Any]] = {
    preset: {name: values[column] for name, values in PRESET_TABLE.items()}
    for column, preset in enumerate(PRESET_NAMES)
}


def preset_option(name: str, help: str) -> Any:
    """A field that defaults to the preset's value, which `--help` shows for each preset."""
    values = ", ".join(f"{preset} {options[name]}" for preset, options in PRESETS.items())
    return HfArg(default=None, help=f"{help} By preset: {values}.")
