"""The presets of the method: the options that tell its forms apart, with their values."""

from typing import Any


# What the paper's text says
PAPER: dict[str, Any] = {
    "router_gradient": "straight_through",
    "expert_init": "zero",
    "expert_bias": False,
    "lora_dropout": 0.05,
    "head_side": "teacher",
    "head_form": "mlp",
    "feature_normalization": "none",
    "grid_matching": "learned",
    "distillation_loss": "mse",
    "summary_heads": False,
    "summary_loss": "cosine",
    "cosine_share": 0.9,
    "token_weighting": "cls_attention",
    "teacher_weighting": "cls_similarity",
    "clip_share": 0.8,
    "teacher_dropping": 0.0,
    "lambda_kd": 0.5,
    "balance_form": "per_layer",
    "lambda_balance": 0.01,
    "distill_text_only_rows": False,
    "geometry": "shared",
    "cut_tower": True,
}
# What encoders from several teachers have in common: heads on the student, and teachers of the same weight
ENCODER = PAPER | {
    "head_side": "student",
    "grid_matching": "upsample",
    "token_weighting": "none",
    "teacher_weighting": "equal",
    "clip_share": None,
    "lambda_kd": 1.0,
}
# Each preset says only where it differs; docs/method.md has the source of each value
PRESETS: dict[str, dict[str, Any]] = {
    "paper": PAPER,
    # What the authors' code computes
    "released": PAPER
    | {
        "router_gradient": "none",
        "expert_init": "kaiming",
        "expert_bias": True,
        "token_weighting": "released",
        "teacher_weighting": "released",
        "balance_form": "pooled",
        "distill_text_only_rows": True,
        "geometry": "per_teacher",
        "cut_tower": False,
    },
    # This project's form: heads that cannot amplify predict the teachers' whitened features
    "student_heads": ENCODER
    | {
        "head_form": "unit_linear",
        "feature_normalization": "whiten",
        "grid_matching": "resample",
        "clip_share": 0.2,
        "lambda_kd": 4.0,
    },
    # AM-RADIO (arXiv 2312.06709) with PHI-S (arXiv 2410.01680)
    "radio": ENCODER | {"feature_normalization": "phi_s", "summary_heads": True},
    # Efficient Universal Perception Encoder (arXiv 2603.22387)
    "eupe": ENCODER
    | {"feature_normalization": "standardize", "distillation_loss": "cosine_smooth_l1", "summary_heads": True},
    # UNIC (arXiv 2408.05088): the mean of summary and patches, hence the weight 0.5
    "unic": ENCODER
    | {
        "feature_normalization": "standardize",
        "distillation_loss": "cosine_smooth_l1",
        "summary_heads": True,
        "summary_loss": "cosine_smooth_l1",
        "cosine_share": 0.5,
        "teacher_dropping": 0.5,
        "lambda_kd": 0.5,
    },
    # Theia (arXiv 2407.20179): patches alone
    "theia": ENCODER | {"feature_normalization": "standardize", "distillation_loss": "cosine_smooth_l1"},
}
