"""The key map between the layout of the MoVE-KD authors' checkpoints and ours, both ways."""

import re

import torch


# (authors' prefix, ours), most specific first. The tower's own prefix is also met alone, in a tower-only state dict.
PREFIXES = (
    ("model.vision_tower.vision_tower.vision_model.", "model.vision_tower."),
    ("vision_model.", "vision_tower."),
    ("model.image_newline", "model.image_newline"),
    ("model.mm_projector.0.", "model.multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "model.multi_modal_projector.linear_2."),
    ("model.", "model.language_model."),
    ("lm_head.", "lm_head."),
    ("sam_adapter_1.", "distiller.sam.channels."),
    ("sam_adapter_2.", "distiller.sam.tokens."),
    ("eva_adapter_1.", "distiller.eva02.channels."),
    ("eva_adapter_2.", "distiller.eva02.tokens."),
    ("pix2struct_adapter_1.", "distiller.pix2struct.channels."),
    ("pix2struct_adapter_2.", "distiller.pix2struct.tokens."),
    ("convnext_adapter_1.", "distiller.convnext.channels."),
    ("convnext_adapter_2.", "distiller.convnext.tokens."),
)
EXPERT_GROUPS = {"moe_down": "fc1_experts", "moe_up": "fc2_experts"}
EXPERT_TENSORS = {
    "lora_A.weight": "weight_a",
    "lora_A.bias": "bias_a",
    "lora_B.weight": "weight_b",
    "lora_B.bias": "bias_b",
}
_THEIR_EXPERT = re.compile(r"(.*\.mlp\.|)(moe_down|moe_up)\.(\d+)\.(lora_[AB]\.(?:weight|bias))")
_OUR_EXPERT = re.compile(r"(.*\.mlp\.|)(fc1_experts|fc2_experts)\.(weight_a|weight_b|bias_a|bias_b)")


def _replace_prefix(key: str, prefixes: tuple[tuple[str, str], ...]) -> str:
    for prefix, replacement in prefixes:
        if key.startswith(prefix):
            return replacement + key.removeprefix(prefix)
    return key


def key_from_original(key: str) -> tuple[str, int | None]:
    """Our key for one of the authors', and which expert of the packed tensor it holds (`None` for all else)."""
    expert = None
    if match := _THEIR_EXPERT.fullmatch(key):
        mlp, group, index, tensor = match.groups()
        key, expert = f"{mlp}{EXPERT_GROUPS[group]}.{EXPERT_TENSORS[tensor]}", int(index)
    return _replace_prefix(key.replace("original_module.", ""), PREFIXES), expert


def key_to_original(key: str, expert: int | None = None) -> str:
    """The authors' key for one of ours; `expert` says which, for a packed tensor."""
    if match := _OUR_EXPERT.fullmatch(key):
        mlp, group, tensor = match.groups()
        group = next(theirs for theirs, ours in EXPERT_GROUPS.items() if ours == group)
        tensor = next(theirs for theirs, ours in EXPERT_TENSORS.items() if ours == tensor)
        key = f"{mlp}{group}.{expert}.{tensor}"
    key = re.sub(r"(^|\.mlp\.)(fc[12]\.)", r"\1original_module.\2", key)
    return _replace_prefix(key, tuple((ours, theirs) for theirs, ours in PREFIXES))


def is_packed(key: str) -> bool:
    """Whether one of our keys holds all experts of a layer."""
    return _OUR_EXPERT.fullmatch(key) is not None


def pack_experts(key: str, experts: list[torch.Tensor]) -> torch.Tensor:
    """One packed tensor of [`LoraExperts`] from its experts' parts, in their order."""
    if key.endswith("bias_b"):
        return torch.stack(experts)
    return torch.cat(experts, dim=1 if key.endswith("weight_b") else 0)


def unpack_experts(key: str, packed: torch.Tensor, num_experts: int) -> list[torch.Tensor]:
    """The inverse of [`pack_experts`]."""
    if key.endswith("bias_b"):
        return list(packed.unbind())
    return [part.contiguous() for part in packed.chunk(num_experts, dim=1 if key.endswith("weight_b") else 0)]
