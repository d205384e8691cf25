"""Published recipes beside each other and beside this project's, and what the mixture of experts is worth."""

from typing import Any

from benchmarks.replication.arms import ABLATION, ARMS, DENSE, ONE_EXPERT, STUDENT_SIDE, UNIT, rates_apart
from benchmarks.replication.design import HERE, Arm, Experiment, Schedule


RECIPE, ENCODER, TRAINED, FROZEN = (
    "recipes",
    "an encoder first",
    "mixture of experts, base tower trained",
    "mixture of experts, base tower frozen",
)
PUBLISHED = ("radio", "eupe", "unic", "theia")
HEADLINE = ("paper", *PUBLISHED, "student_heads")
OWN = STUDENT_SIDE | UNIT
FROZEN_BASE = {"freeze_base_tower": True}
ASSIGNED: dict[str, Any] = {"expert_assignment": "teacher", "num_experts": 4}
LOSS_FREE: dict[str, Any] = {"balance_form": "bias", "lambda_balance": 0.0}


def published(name: str) -> Arm:
    return Arm(f"`{name}`", RECIPE, name, settings=DENSE | {"distillation_preset": name})


ARMS_OF_RECIPES = {
    "unfrozen_tuned": ARMS["unfrozen_tuned"],
    "clip_anchor": ARMS["clip_anchor"],
    "paper": Arm("`paper`", RECIPE, "paper"),
    **{name: published(name) for name in PUBLISHED},
    "student_heads": Arm("`student_heads` without experts", RECIPE, "student_heads", settings=OWN | DENSE),
    "encoder_first": Arm(
        "`student_heads`, first without a language model", ENCODER, "encoder_first", settings=OWN | DENSE
    ),
    "encoder_frozen": Arm(
        "`student_heads` without a language model, then the tower frozen",
        ENCODER,
        "encoder_frozen",
        settings=OWN | DENSE,
        frozen_after_encoder=True,
    ),
    "experts": Arm("MoLE with a balance loss", TRAINED, "experts", settings=OWN),
    "experts_bias": Arm("MoLE balanced without a loss", TRAINED, "experts", settings=OWN | LOSS_FREE),
    "experts_assigned": Arm("an expert for each teacher", TRAINED, "experts", settings=OWN | ASSIGNED),
    "experts_without_dropout": Arm(
        "MoLE with a balance loss, no dropout", TRAINED, "experts", settings=OWN | {"lora_dropout": 0.0}
    ),
    "dense_lora": Arm("one dense LoRA of MoLE's size", TRAINED, "experts", settings=OWN | ONE_EXPERT),
    "frozen_experts": Arm("MoLE with a balance loss", FROZEN, "frozen_experts", settings=OWN | FROZEN_BASE),
    "frozen_experts_bias": Arm(
        "MoLE balanced without a loss", FROZEN, "frozen_experts", settings=OWN | FROZEN_BASE | LOSS_FREE
    ),
    "frozen_experts_assigned": Arm(
        "an expert for each teacher", FROZEN, "frozen_experts", settings=OWN | FROZEN_BASE | ASSIGNED
    ),
    "frozen_dense_lora": Arm(
        "one dense LoRA of MoLE's size", FROZEN, "frozen_experts", settings=OWN | FROZEN_BASE | ONE_EXPERT
    ),
    "encoders": ARMS["encoders"],
}

TWO_SHARES = tuple(rates_apart(6e-3, 5e-3, share) for share in (0.2, 0.5))
SCHEDULES: dict[str, tuple[Schedule, ...]] = {
    "unfrozen_tuned": tuple(Schedule(None, rate) for rate in (5e-5, 1.5e-4, 5e-4)),
    "paper": (*(Schedule(None, rate) for rate in (5e-4, 1.5e-3)), rates_apart(6e-3, 1.5e-3)),
    # The same for every recipe: two schedules, each also at the loss weight of `student_heads`, and a lower tower rate
    **dict.fromkeys(
        PUBLISHED, (*TWO_SHARES, *(each._replace(kd_weight=4.0) for each in TWO_SHARES), rates_apart(6e-3, 1.5e-3))
    ),
    "student_heads": (*TWO_SHARES, rates_apart(6e-3, 1.5e-3)),
    "encoder_first": tuple(each._replace(encoder_share=0.3) for each in TWO_SHARES),
    "encoder_frozen": tuple(
        rates_apart(6e-3, None, share)._replace(encoder_share=encoder) for share, encoder in ((0.3, 0.3), (0.3, 0.5))
    ),
    "experts": TWO_SHARES,
    "frozen_experts": TWO_SHARES,
    "encoders": (Schedule(pretrain_share=0.3), rates_apart(share=0.3), rates_apart(share=0.5)),
}
COMPARISONS = [
    *(
        (name, "clip_anchor", f"Does `{name}` beat the CLIP anchor?")
        for name in ("paper", *PUBLISHED, "student_heads")
    ),
    *((name, "student_heads", f"Does `{name}` beat `student_heads`?") for name in PUBLISHED),
    ("encoder_first", "student_heads", "Does an encoder first serve better, at equal steps?"),
    ("encoder_frozen", "student_heads", "Is it enough to distill before, and to freeze the tower?"),
    *(
        (f"{prefix}{name}", rival, f"Is {title} worth its place where the base is {where}?")
        for prefix, where, rival in (("", "trained", "student_heads"), ("frozen_", "frozen", "frozen_dense_lora"))
        for name, title in (
            ("experts", "MoLE"),
            ("experts_bias", "MoLE without a balance loss"),
            ("experts_assigned", "an expert for each teacher"),
        )
    ),
    ("experts", "experts_without_dropout", "Does dropout on the experts' input earn anything?"),
    *(
        (name, "dense_lora", f"Does `{name}` beat one dense LoRA?")
        for name in ("experts", "experts_bias", "experts_assigned")
    ),
]
RECIPES = Experiment(
    arms=ARMS_OF_RECIPES,
    headline=HEADLINE,
    controls=["unfrozen_tuned", "clip_anchor"],
    upper="encoders",
    comparisons=COMPARISONS,
    schedules=SCHEDULES,
    chosen_twice=("student_heads", "encoders"),
    folder=HERE / "recipes",
    first_seed=40,
    networks=(1, 2, 3),
)
EXPERIMENTS = {"ablation": ABLATION, "recipes": RECIPES}
