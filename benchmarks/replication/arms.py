"""The ablation: the paper's ladder and this project's, arm by arm, and the comparisons between them."""

from typing import Any

from benchmarks.replication.design import Arm, Experiment, Schedule


CLIP_ALONE = ("clip",)
NO_TEACHERS = ()

RANK = 8


def rates_apart(pretrain: float | None = None, tower: float | None = None, share: float = 0.5) -> Schedule:
    """A low rate for the language model, which knows the answers in words, and a high one for the projector."""
    return Schedule(pretrain, tower, 4e-3, 1e-4, share)


# The three arms that show what the mixture is worth. The same schedules are tried with all three, and with two
# seeds: these arms learn late, so that one seed alone ranked their schedules by chance
CHOSEN_TWICE = ("heads_unit", "heads_unit_experts", "heads_unit_dense_lora")

# The schedules that are tried on validation, by arm. Other arms take the best schedule of one of these arms. Wider
# searches on an earlier form of the questions left these
SCHEDULES: dict[str, tuple[Schedule, ...]] = {
    **dict.fromkeys(("frozen", "unfrozen"), (Schedule(), Schedule(pretrain_share=0.7))),
    "unfrozen_tuned": tuple(Schedule(None, rate) for rate in (1.5e-5, 5e-5, 1.5e-4)),
    "paper": (*(Schedule(None, rate) for rate in (5e-4, 1.5e-3)), Schedule(6e-3, 1.5e-3)),
    "adapters_weighted": tuple(Schedule(None, rate) for rate in (5e-4, 1.5e-3)),
    **dict.fromkeys(CHOSEN_TWICE, tuple(rates_apart(6e-3, 5e-3, share) for share in (0.2, 0.3, 0.5))),
    "encoders": (Schedule(pretrain_share=0.3), rates_apart(share=0.3)),
}


CONTROL, LADDER, RELEASED = "controls", "the paper's ladder", "released"
STUDENT, MIXTURE, UPPER_GROUP = "student-side ladder", "mixture of experts", "upper reference"
DENSE: dict[str, Any] = {"num_experts": 0}
ONE_EXPERT: dict[str, Any] = {
    "num_experts": 1,
    "lora_rank": 3 * RANK,
    "lora_alpha": 3 * RANK,
    "router_gradient": "none",
    "lambda_balance": 0.0,
}
EQUAL = {"token_weighting": "none", "teacher_weighting": "equal"}
# Weight, components and form of the heads were chosen on the split `validation` beforehand, in runs that are not among
# the results
STUDENT_SIDE: dict[str, Any] = {
    "distillation_preset": "student_heads",
    "token_weighting": "none",
    "head_form": "mlp",
    "lambda_kd": 4.0,
    "whitening_components": 32,
}
UNIT = {"head_form": "unit_linear"}

ARMS = {
    "frozen": Arm("no KD, tower frozen", CONTROL, "frozen", NO_TEACHERS, DENSE | {"freeze_vision_tower": True}),
    "unfrozen": Arm("no KD, tower unfrozen", CONTROL, "unfrozen", NO_TEACHERS, DENSE),
    "unfrozen_tuned": Arm("no KD, tower at its own rate", CONTROL, "unfrozen_tuned", NO_TEACHERS, DENSE),
    "experts_without_kd": Arm("no KD, MoLE", CONTROL, "unfrozen_tuned", NO_TEACHERS, {}),
    "clip_anchor": Arm("KD with the CLIP anchor alone", CONTROL, "paper", CLIP_ALONE, DENSE | EQUAL),
    "adapters": Arm("+ adapters, all teachers", LADDER, "paper", settings=DENSE | EQUAL),
    "adapters_experts": Arm("+ MoLE", LADDER, "paper", settings=EQUAL),
    "adapters_experts_tokens": Arm("+ token weights", LADDER, "paper", settings={"teacher_weighting": "equal"}),
    "paper": Arm("+ teacher weights: `paper`", LADDER, "paper"),
    "paper_without_experts": Arm("`paper` without MoLE", LADDER, "paper", settings=DENSE),
    "released": Arm("`released`", RELEASED, "paper", settings={"distillation_preset": "released"}),
    "adapters_weighted": Arm(
        "adapters on the teachers' side, at the loss weights of the arms below",
        STUDENT,
        "adapters_weighted",
        settings=DENSE | EQUAL | {"lambda_kd": 4.0, "clip_share": 0.2},
    ),
    "heads_raw": Arm(
        "heads on the student's side, raw features",
        STUDENT,
        "heads_unit",
        settings=STUDENT_SIDE | DENSE | {"feature_normalization": "none"},
    ),
    "heads_whitened": Arm("+ whitened features", STUDENT, "heads_unit", settings=STUDENT_SIDE | DENSE),
    "heads_unit": Arm("+ heads that cannot amplify", STUDENT, "heads_unit", settings=STUDENT_SIDE | DENSE | UNIT),
    "heads_unit_experts": Arm(
        "heads that cannot amplify, MoLE", MIXTURE, "heads_unit_experts", settings=STUDENT_SIDE | UNIT
    ),
    "heads_unit_dense_lora": Arm(
        "heads that cannot amplify, one dense LoRA of MoLE's size",
        MIXTURE,
        "heads_unit_dense_lora",
        settings=STUDENT_SIDE | UNIT | ONE_EXPERT,
    ),
    "encoders": Arm("all encoders kept at inference", UPPER_GROUP, "encoders", NO_TEACHERS, DENSE, side_by_side=True),
}

CONTROLS = ["frozen", "unfrozen", "unfrozen_tuned", "experts_without_kd", "clip_anchor"]
# Arms that the conclusions rest on, which get more seeds
HEADLINE = [
    "frozen",
    "unfrozen_tuned",
    "experts_without_kd",
    "clip_anchor",
    "released",
    "paper",
    *CHOSEN_TWICE,
    "encoders",
]
UPPER = "encoders"
COMPARISONS = [
    ("unfrozen_tuned", "frozen", "Does the tower profit from being trained on answers alone?"),
    ("clip_anchor", "unfrozen_tuned", "Does the CLIP anchor alone help?"),
    ("experts_without_kd", "unfrozen_tuned", "Does MoLE help without KD?"),
    ("adapters", "clip_anchor", "Do more teachers help, through adapters on the teachers' side?"),
    ("adapters_experts", "adapters", "Does MoLE help the adapters?"),
    ("adapters_experts_tokens", "adapters_experts", "Do token weights help?"),
    ("paper", "adapters_experts_tokens", "Do teacher weights help?"),
    ("paper", "paper_without_experts", "Does `paper` need MoLE?"),
    ("paper", "clip_anchor", "Does `paper` beat the CLIP anchor?"),
    ("released", "clip_anchor", "Does `released` beat the CLIP anchor?"),
    ("adapters_weighted", "adapters", "Do the adapters profit from 32 times the weight on the other teachers?"),
    ("heads_raw", "adapters_weighted", "Do heads on the student's side beat adapters of the same weights?"),
    ("heads_whitened", "heads_raw", "Does whitening the features help?"),
    ("heads_unit", "heads_whitened", "Do heads that cannot amplify help?"),
    ("heads_unit_experts", "heads_unit", "Does MoLE help the student-side form?"),
    ("heads_unit_dense_lora", "heads_unit", "Does a dense LoRA help the student-side form?"),
    ("heads_unit_experts", "heads_unit_dense_lora", "Does MoLE beat a dense LoRA of its size?"),
    ("heads_unit", "clip_anchor", "Does the student-side form without experts beat the CLIP anchor?"),
    ("heads_unit_experts", "clip_anchor", "Does the student-side form with MoLE beat the CLIP anchor?"),
    ("heads_unit_experts", "paper", "Does the student-side form with MoLE beat `paper`?"),
]
ABLATION = Experiment(ARMS, HEADLINE, CONTROLS, UPPER, COMPARISONS, SCHEDULES, CHOSEN_TWICE)
