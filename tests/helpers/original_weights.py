"""State dicts between the layout of the original checkpoints and ours."""

from collections import defaultdict

import torch

from hub.convert_original_keys import is_packed, key_from_original, key_to_original, pack_experts, unpack_experts


def state_dict_from_original(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An original state dict under our keys. The keys of the adapters begin with `distiller.`."""
    converted: dict[str, torch.Tensor] = {}
    experts: dict[str, dict[int, torch.Tensor]] = defaultdict(dict)
    for original_key, tensor in state_dict.items():
        key, expert = key_from_original(original_key)
        if expert is None:
            converted[key] = tensor
        else:
            experts[key][expert] = tensor
    for key, parts in experts.items():
        if sorted(parts) != list(range(len(parts))):
            raise ValueError(f"{key} needs the experts 0 to {len(parts) - 1}; the checkpoint has {sorted(parts)}.")
        converted[key] = pack_experts(key, [parts[index] for index in range(len(parts))])
    return converted


def state_dict_to_original(state_dict: dict[str, torch.Tensor], num_experts: int) -> dict[str, torch.Tensor]:
    """The inverse of [`state_dict_from_original`]."""
    converted = {}
    for key, tensor in state_dict.items():
        if is_packed(key):
            for expert, part in enumerate(unpack_experts(key, tensor, num_experts)):
                converted[key_to_original(key, expert)] = part
        else:
            converted[key_to_original(key)] = tensor
    return converted
