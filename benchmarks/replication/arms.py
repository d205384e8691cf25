"""The arms of the replication as data: what each one changes in the recipe that all share, and what is compared."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple


ALL_TEACHERS = ("clip", "detector", "texture", "reader")
CLIP_ALONE = ("clip",)
NO_TEACHERS = ()

RANK = 8


class Schedule(NamedTuple):
    """
    What is chosen on validation of how a run trains, all else being the recipe's.

    Args:
        pretrain_vision_tower_learning_rate: The tower's in the first stage; `None` is that of projector and heads.
            Without distillation only experts train then.
        vision_tower_learning_rate: The tower's in the second stage; `None` as above.
        learning_rate: Of projector and heads in the second stage.
        language_model_learning_rate: The language model's in the second stage; `None` as above.
        pretrain_share: Of all steps, the first stage's. All runs have as many steps in both stages together.
    """

    pretrain_vision_tower_learning_rate: float | None = None
    vision_tower_learning_rate: float | None = None
    learning_rate: float = 5e-4
    language_model_learning_rate: float | None = None
    pretrain_share: float = 0.5


def _apart(pretrain: float | None = None, tower: float | None = None, share: float = 0.5) -> Schedule:
    """The language model can answer everything in words, and stays near that while the projector finds the words."""
    return Schedule(pretrain, tower, 4e-3, 1e-4, share)


# The three that are compared for what a mixture is worth: the same schedules are tried with all, each with two seeds
# instead of one, since they learn late, and on one seed alone their schedules were far apart by chance
CHOSEN_TWICE = ("heads_unit", "heads_unit_experts", "heads_unit_dense_lora")

# What is tried on validation, by the arm it is tried with; other arms take what that one does best with. Wider
# searches on earlier forms of the questions left these
SCHEDULES: dict[str, tuple[Schedule, ...]] = {
    **dict.fromkeys(("frozen", "unfrozen"), (Schedule(), Schedule(pretrain_share=0.7))),
    "unfrozen_tuned": tuple(Schedule(None, rate) for rate in (1.5e-5, 5e-5, 1.5e-4)),
    "paper": (*(Schedule(None, rate) for rate in (5e-4, 1.5e-3)), Schedule(6e-3, 1.5e-3)),
    "adapters_weighted": tuple(Schedule(None, rate) for rate in (5e-4, 1.5e-3)),
    **dict.fromkeys(CHOSEN_TWICE, tuple(_apart(6e-3, 5e-3, share) for share in (0.2, 0.3, 0.5))),
    "encoders": (Schedule(pretrain_share=0.3), _apart(share=0.3)),
}


@dataclass(frozen=True)
class Arm:
    """
    Args:
        title: For the tables.
        group: Heading that it stands under.
        schedule_of: Name of the arm on whose validation the schedule is chosen for this one.
        teachers: Names of the teachers; none is training without distillation.
        settings: Fields of [`~train.config.MoveKDSFTConfig`] for both stages.
        side_by_side: All encoders are kept at inference and nothing is distilled.
    """

    title: str
    group: str
    schedule_of: str
    teachers: tuple[str, ...] = ALL_TEACHERS
    settings: dict[str, Any] = field(default_factory=dict)
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
# The weight of the distillation loss, the components and the form of the heads were tried on pictures of the split
# `validation` first, in runs that are not among the results
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
        "adapters on the teachers' side, at the weights of what follows",
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
# Arms with more seeds
HEADLINE = [
    "frozen",
    "unfrozen_tuned",
    "experts_without_kd",
    "clip_anchor",
    "released",
    "paper",
    "heads_unit",
    "heads_unit_experts",
    "heads_unit_dense_lora",
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
    ("adapters_weighted", "adapters", "Do 32 times the weight on the other teachers help the adapters?"),
    ("heads_raw", "adapters_weighted", "Do heads on the student's side beat adapters of the same weights?"),
    ("heads_whitened", "heads_raw", "Does whitening the features help?"),
    ("heads_unit", "heads_whitened", "Do heads that cannot amplify help?"),
    ("heads_unit_experts", "heads_unit", "Does MoLE help there?"),
    ("heads_unit_dense_lora", "heads_unit", "Does a dense LoRA help there?"),
    ("heads_unit_experts", "heads_unit_dense_lora", "Does MoLE beat a dense LoRA of its size?"),
    ("heads_unit", "clip_anchor", "Does the student-side form without experts beat the CLIP anchor?"),
    ("heads_unit_experts", "clip_anchor", "Does the student-side form with MoLE beat the CLIP anchor?"),
    ("heads_unit_experts", "paper", "Does the student-side form with MoLE beat `paper`?"),
]
