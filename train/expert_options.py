"""Options of the experts that depend on each other."""

from typing import Any


def check_expert_assignment(args: Any) -> None:
    """Refuse `expert_assignment: teacher` in a [`MoveKDSFTConfig`] where experts and teachers do not match."""
    if args.expert_assignment == "router":
        return
    needed = {"distill": True, "distill_tiles": "base", "router_gradient": "straight_through"}
    if other := {name: getattr(args, name) for name, value in needed.items() if getattr(args, name) != value}:
        raise ValueError(
            f"`expert_assignment` is 'teacher', with {other}: each expert learns from whole images by its teacher's "
            f"loss, and the routers by their gradient. Set { {name: needed[name] for name in other} }, or "
            "`expert_assignment: router`."
        )
    teachers = args.teachers or []
    if args.num_experts != len(teachers) or len(teachers) < 2:
        raise ValueError(
            f"`expert_assignment` is 'teacher', with `num_experts` {args.num_experts} and {len(teachers)} teachers. "
            "Give two teachers or more, and as many experts."
        )


def set_balance(args: Any, asked: float | None) -> None:
    """
    Fill in the options of `balance_form: bias` in a [`MoveKDSFTConfig`]: no weight of a balance loss, and the rate.

    Args:
        args (`MoveKDSFTConfig`): The options, with those of the preset.
        asked (`float`, *optional*): The value of `lambda_balance` that was given, if any.
    """
    if args.balance_form != "bias":
        if args.balance_rate is not None:
            raise ValueError(
                f"`balance_rate` is {args.balance_rate}, but `balance_form` {args.balance_form!r} moves no bias. "
                "Leave it out, or set `balance_form: bias`."
            )
        return
    args.balance_rate = 1e-3 if args.balance_rate is None else args.balance_rate
    if asked or args.balance_rate <= 0:
        raise ValueError(
            f"`lambda_balance` is {asked} and `balance_rate` {args.balance_rate}, but `balance_form: bias` has no "
            "balance loss and moves by a positive rate. Leave both out, or choose another form."
        )
    args.lambda_balance = 0.0
    if args.num_experts < 2 or args.freeze_vision_tower or args.router_gradient == "none":
        raise ValueError(
            f"`balance_form` is 'bias', with `num_experts` {args.num_experts}, `freeze_vision_tower` "
            f"{args.freeze_vision_tower} and `router_gradient` {args.router_gradient!r}: it needs two experts or more "
            "and routers that learn from the other losses. Set `router_gradient: straight_through` and train the "
            "experts, or choose another form."
        )
