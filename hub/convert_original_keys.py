"""How the keys of the MoVE-KD authors' checkpoints (the original layout) map to ours, and back."""

import re

import torch


# (original prefix, ours), most specific first. State dicts of the tower alone have the prefix `vision_model.`.
PREFIXES = (
    ("model.vision_tower.vision_tower.vision_model.", "model.vision_tower."),
    ("vision_model.", "vision_tower."),
    ("model.image_newline", "model.image_newline"),
    ("model.mm_projector.0.", "model.multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "model.multi_modal_projector.linear_2."),
    ("model.", "model.language_model."),
    ("lm_head.", "lm_head."),
    *(
        (f"{original}_adapter_{number}.", f"distiller.{ours}.{part}.")
        for original, ours in {
            "sam": "sam",
            "eva": "eva02",
            "pix2struct": "pix2struct",
            "convnext": "convnext",
        }.items()
        for number, part in ((1, "channels"), (2, "tokens"))
    ),
)
EXPERT_GROUPS = {"moe_down": "fc1_experts", "moe_up": "fc2_experts"}
EXPERT_TENSORS = {
    "lora_A.weight": "weight_a",
    "lora_A.bias": "bias_a",
    "lora_B.weight": "weight_b",
    "lora_B.bias": "bias_b",
}
_ORIGINAL_EXPERT = re.compile(r"(.*\.mlp\.|)(moe_down|moe_up)\.(\d+)\.(lora_[AB]\.(?:weight|bias))")
_PACKED_EXPERTS = re.compile(r"(.*\.mlp\.|)(fc1_experts|fc2_experts)\.(weight_a|weight_b|bias_a|bias_b)")


def _inverse(mapping: dict[str, str]) -> dict[str, str]:
    return {value: key for key, value in mapping.items()}


def replace_prefix(key: str, prefixes: tuple[tuple[str, str], ...]) -> str:
    """The key with the first prefix of (prefix, replacement) that it has replaced."""
    for prefix, replacement in prefixes:
        if key.startswith(prefix):
            return replacement + key.removeprefix(prefix)
    return key


def key_from_original(key: str) -> tuple[str, int | None]:
    """Our key, and for a weight of an expert its index in the packed weight (else `None`)."""
    expert = None
    if match := _ORIGINAL_EXPERT.fullmatch(key):
        mlp, group, index, tensor = match.groups()
        key, expert = f"{mlp}{EXPERT_GROUPS[group]}.{EXPERT_TENSORS[tensor]}", int(index)
    return replace_prefix(key.replace("original_module.", ""), PREFIXES), expert


def key_to_original(key: str, expert: int | None = None) -> str:
    """The original key; a packed weight has one for each `expert`."""
    if match := _PACKED_EXPERTS.fullmatch(key):
        mlp, group, tensor = match.groups()
        key = f"{mlp}{_inverse(EXPERT_GROUPS)[group]}.{expert}.{_inverse(EXPERT_TENSORS)[tensor]}"
    key = re.sub(r"(^|\.mlp\.)(fc[12]\.)", r"\1original_module.\2", key)
    return replace_prefix(key, tuple((ours, original) for original, ours in PREFIXES))


def is_packed(key: str) -> bool:
    """Whether a key of ours holds all experts of a layer."""
    return _PACKED_EXPERTS.fullmatch(key) is not None


def pack_experts(key: str, experts: list[torch.Tensor]) -> torch.Tensor:
    """The packed tensor of [`LoraExperts`] from the tensors of its experts, in their order."""
    if key.endswith("bias_b"):
        return torch.stack(experts)
    return torch.cat(experts, dim=1 if key.endswith("weight_b") else 0)


def unpack_experts(key: str, packed: torch.Tensor, num_experts: int) -> list[torch.Tensor]:
    """The inverse of [`pack_experts`]."""
    if key.endswith("bias_b"):
        return list(packed.unbind())
    return [part.contiguous() for part in packed.chunk(num_experts, dim=1 if key.endswith("weight_b") else 0)]
