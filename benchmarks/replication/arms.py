"""The arms of the replication as data: what each one changes in the recipe that all share, and what is compared."""

from dataclasses import dataclass, field
from typing import Any


ALL_TEACHERS = ("clip", "detector", "texture", "reader")
CLIP_ALONE = ("clip",)
NO_TEACHERS = ()

RANK = 8
# Of the tower in the first stage (`None`: as everything else) and in the second, by the arm that is tried on
# validation; others take what it does best with. Without distillation a tower does not train in the first stage
TOWER_RATES: dict[str, tuple[tuple[float | None, float], ...]] = {
    "unfrozen_tuned": ((None, 1.5e-5), (None, 5e-5), (None, 1.5e-4), (None, 5e-4)),
    "paper": ((None, 5e-4), (None, 1.5e-3), (None, 5e-3), (6e-3, 5e-3)),
    "heads_unit": ((None, 5e-3), (6e-3, 1.5e-3), (6e-3, 5e-3), (6e-3, 1.5e-2)),
}


@dataclass(frozen=True)
class Arm:
    """
    Args:
        title: For the tables.
        group: Heading that it stands under.
        teachers: Names of the teachers; none is training without distillation.
        settings: Fields of [`~train.config.MoveKDSFTConfig`] for both stages.
        rates_of: Name of the arm on whose validation the tower's learning rates are chosen for this one; `None` keeps
            the recipe's.
        side_by_side: All encoders are kept at inference and nothing is distilled.
    """

    title: str
    group: str
    teachers: tuple[str, ...] = ALL_TEACHERS
    settings: dict[str, Any] = field(default_factory=dict)
    rates_of: str | None = None
    side_by_side: bool = False


CONTROL, LADDER, RELEASED = "controls", "the paper's ladder", "released"
STUDENT, MIXTURE, UPPER_GROUP = "student-side ladder", "mixture of experts", "upper reference"
DENSE: dict[str, Any] = {"num_experts": 0}
ONE_EXPERT: dict[str, Any] = {
    "num_experts": 1,
    "lora_rank": 3 * RANK,
    "lora_alpha": 3 * RANK,
    # A router with one expert has nothing to learn
    "router_gradient": "none",
    "lambda_balance": 0.0,
}
EQUAL = {"token_weighting": "none", "teacher_weighting": "equal"}
# The weight of the distillation loss, the components and the form of the heads were tried on validation first
STUDENT_SIDE: dict[str, Any] = {
    "distillation_preset": "student_heads",
    "token_weighting": "none",
    "head_form": "mlp",
    "lambda_kd": 4.0,
    "whitening_components": 32,
}
UNIT = {"head_form": "unit_linear"}

ARMS = {
    "frozen": Arm("no KD, tower frozen", CONTROL, NO_TEACHERS, DENSE | {"freeze_vision_tower": True}),
    "unfrozen": Arm("no KD, tower unfrozen", CONTROL, NO_TEACHERS, DENSE),
    "unfrozen_tuned": Arm("no KD, tower at its own rate", CONTROL, NO_TEACHERS, DENSE, rates_of="unfrozen_tuned"),
    "experts_without_kd": Arm("no KD, MoLE", CONTROL, NO_TEACHERS, {}, rates_of="unfrozen_tuned"),
    "clip_anchor": Arm("KD with the CLIP anchor alone", CONTROL, CLIP_ALONE, DENSE | EQUAL, rates_of="paper"),
    "adapters": Arm("+ adapters, all teachers", LADDER, settings=DENSE | EQUAL, rates_of="paper"),
    "adapters_experts": Arm("+ MoLE", LADDER, settings=EQUAL, rates_of="paper"),
    "adapters_experts_tokens": Arm(
        "+ token weights", LADDER, settings={"teacher_weighting": "equal"}, rates_of="paper"
    ),
    "paper": Arm("+ teacher weights: `paper`", LADDER, rates_of="paper"),
    "paper_without_experts": Arm("`paper` without MoLE", LADDER, settings=DENSE, rates_of="paper"),
    "released": Arm("`released`", RELEASED, settings={"distillation_preset": "released"}, rates_of="paper"),
    "heads_raw": Arm(
        "heads on the student's side, raw features",
        STUDENT,
        settings=STUDENT_SIDE | DENSE | {"feature_normalization": "none"},
        rates_of="heads_unit",
    ),
    "heads_whitened": Arm("+ whitened features", STUDENT, settings=STUDENT_SIDE | DENSE, rates_of="heads_unit"),
    "heads_unit": Arm(
        "+ heads that cannot amplify", STUDENT, settings=STUDENT_SIDE | DENSE | UNIT, rates_of="heads_unit"
    ),
    "heads_unit_experts": Arm(
        "heads that cannot amplify, MoLE", MIXTURE, settings=STUDENT_SIDE | UNIT, rates_of="heads_unit"
    ),
    "heads_unit_dense_lora": Arm(
        "heads that cannot amplify, one dense LoRA of MoLE's size",
        MIXTURE,
        settings=STUDENT_SIDE | UNIT | ONE_EXPERT,
        rates_of="heads_unit",
    ),
    "encoders": Arm("all encoders kept at inference", UPPER_GROUP, NO_TEACHERS, DENSE, side_by_side=True),
}

CONTROLS = ["frozen", "unfrozen", "unfrozen_tuned", "experts_without_kd", "clip_anchor"]
# Arms with more seeds
HEADLINE = [
    "frozen",
    "unfrozen_tuned",
    "clip_anchor",
    "released",
    "paper",
    "heads_unit",
    "heads_unit_experts",
    "encoders",
]
UPPER = "encoders"
COMPARISONS = [
    ("unfrozen_tuned", "frozen", "Does the tower profit from being trained on answers alone?"),
    ("clip_anchor", "unfrozen_tuned", "Does the CLIP anchor alone help?"),
    ("experts_without_kd", "unfrozen_tuned", "Does MoLE help without KD?"),
    ("adapters", "clip_anchor", "Do more teachers help, through adapters on the teachers' side?"),
    ("adapters_experts", "adapters", "Does MoLE help then?"),
    ("adapters_experts_tokens", "adapters_experts", "Do token weights help?"),
    ("paper", "adapters_experts_tokens", "Do teacher weights help?"),
    ("paper", "paper_without_experts", "Does `paper` need MoLE?"),
    ("paper", "clip_anchor", "Does `paper` beat the CLIP anchor?"),
    ("released", "clip_anchor", "Does `released` beat the CLIP anchor?"),
    ("heads_raw", "adapters", "Do heads on the student's side beat adapters on the teachers'?"),
    ("heads_whitened", "heads_raw", "Does whitening the features help?"),
    ("heads_unit", "heads_whitened", "Do heads that cannot amplify help?"),
    ("heads_unit_experts", "heads_unit", "Does MoLE help there?"),
    ("heads_unit_experts", "heads_unit_dense_lora", "Does MoLE beat a dense LoRA of its size?"),
    ("heads_unit", "clip_anchor", "Does the student-side form beat the CLIP anchor?"),
    ("heads_unit", "paper", "Does the student-side form beat `paper`?"),
]
