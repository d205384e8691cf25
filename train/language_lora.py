"""
LoRA in the language model, while experts, routers, projector and distillation heads train in full.

PEFT injects the adapters into the language model, so that the student keeps its class, and with it TRL's fused head,
the training forward and the saving. Each save holds the merged model and, in a file of their own, the adapters, from
which training resumes exactly. The frozen weights under the adapters are not saved: a resumed run loads them again,
and checks that they are the same.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import cast_adapter_dtype
from peft.utils.integrations import dequantize_module_weight
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, set_seed

from modeling_movekd.files import new_file
from train.config import MoveKDSFTConfig
from train.distributed import fsdp_is_asked_for


LANGUAGE_LORA_NAME = "language_lora.safetensors"
ADAPTER = "default"  # PEFT's name for the only adapter
# A merged weight may differ from the saved one by this share of LoRA's largest change, as TF32 differs from float32
MERGE_TOLERANCE = 2e-3


def add_language_lora(model: PreTrainedModel, args: MoveKDSFTConfig) -> None:
    """
    Add LoRA to the language model, and with `load_in_4bit` quantize the weights under it to 4-bit NormalFloat (QLoRA,
    arXiv 2305.14314).

    transformers could quantize the model while it loads, but then marks the model as quantized: TRL would cast experts
    and heads to bfloat16, and the saved weights would be packed.
    """
    inject_language_lora(model, args)
    if args.load_in_4bit:
        _quantize(list(language_lora_layers(model).values()), args)


def inject_language_lora(model: PreTrainedModel, args: MoveKDSFTConfig) -> None:
    """
    Add LoRA to the language model without changing its output (B = 0). The adapters are float32, and their values
    depend on the seed alone.
    """
    language_model = model.model.language_model
    targets = args.language_lora_target_modules
    if targets is not None:
        names = [name for name, _ in language_model.named_modules()]
        if unknown := [part for part in targets if not any(f".{name}".endswith(f".{part}") for name in names)]:
            linear = {name.rsplit(".", 1)[-1] for name, part in language_model.named_modules() if _is_linear(part)}
            raise ValueError(
                f"`language_lora_target_modules` names {unknown}, which {type(language_model).__name__} does not have "
                f"as layers. Choose from its linear layers {sorted(linear)}."
            )
    set_seed(args.seed)
    assert args.language_lora_alpha is not None, "the configuration fills it in"
    config = LoraConfig(
        r=args.language_lora_rank,
        lora_alpha=args.language_lora_alpha,
        lora_dropout=args.language_lora_dropout,
        target_modules="all-linear" if targets is None else targets,
    )
    inject_adapter_in_model(config, language_model)
    cast_adapter_dtype(language_model, ADAPTER)
    layers = language_lora_layers(model)
    adapted = {name: part.get_base_layer() for name, part in model.named_modules() if isinstance(part, LoraLayer)}
    if unsupported := [name for name, part in adapted.items() if name not in layers or not _is_linear(part)]:
        raise ValueError(f"LoRA is supported for linear layers only, not for {unsupported}. Choose other modules.")


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def _quantize(layers: list[LoraLinear], args: MoveKDSFTConfig) -> None:
    """Replace the frozen weights under the adapters by 4-bit weights on the device of the run."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise ValueError(
            "`load_in_4bit` needs the package bitsandbytes, which is not installed: `pip install bitsandbytes`, or "
            "set `load_in_4bit: false`."
        ) from error
    # FSDP would shard packed weights, and DeepSpeed does not save them
    if args.deepspeed_plugin is not None or fsdp_is_asked_for():
        raise ValueError(
            "`load_in_4bit` is true, but DeepSpeed and FSDP cannot handle packed 4-bit weights. Start the run with "
            "DDP, or set `load_in_4bit: false`."
        )
    for layer in layers:
        dense: Any = layer.get_base_layer()
        packed: Any = bitsandbytes.nn.Linear4bit(
            dense.in_features,
            dense.out_features,
            bias=dense.bias is not None,
            compute_dtype=torch.bfloat16 if args.bf16 else dense.weight.dtype,
            compress_statistics=True,
            quant_type="nf4",
            device="meta",
        )
        packed.weight = bitsandbytes.nn.Params4bit(
            dense.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4"
        )
        packed.bias = dense.bias
        # On CPUs the first evaluation would change the weights to a bfloat16 format for inference, and not back
        packed.support_avx512bf16_for_cpu = False
        layer.base_layer = packed.to(args.device)


def language_lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """The student's layers with LoRA, by the name that their weights are published under."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLinear)}


def language_lora_facts(model: nn.Module, args: MoveKDSFTConfig) -> dict[str, Any] | None:
    """The facts of LoRA for the model card; `None` without LoRA."""
    if not args.language_lora_rank:
        return None
    return {
        "rank": args.language_lora_rank,
        "alpha": args.language_lora_alpha,
        "dropout": args.language_lora_dropout,
        "learning_rate": args.language_lora_learning_rate or args.learning_rate,
        "target_modules": sorted({name.rsplit(".", 1)[-1] for name in language_lora_layers(model)}),
        "load_in_4bit": args.load_in_4bit,
    }


@torch.no_grad()
def _merged_weight(name: str, layer: LoraLinear, state_dict: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, float]:
    """
    Merge LoRA into a layer's weight: W + alpha / rank * B A, summed in float32.

    Returns:
        The weight `(out_features, in_features)` in the dtype of W before quantization, and the largest change in it.
    """
    base = state_dict[f"{name}.base_layer.weight"]
    if not base.is_floating_point():
        base = dequantize_module_weight(layer.get_base_layer())
    down, up = (state_dict[f"{name}.lora_{part}.{ADAPTER}.weight"].float() for part in "AB")
    delta = (up @ down) * layer.scaling[ADAPTER]
    return (base.float() + delta).to(base.dtype).cpu(), delta.abs().max().item()


def merged_state_dict(
    model: nn.Module, state_dict: Mapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """
    The student's weights with LoRA merged, and 4-bit weights unpacked, under the keys of a student without LoRA.

    Args:
        model (`nn.Module`): The student, which is not changed.
        state_dict (`Mapping[str, torch.Tensor]`, *optional*): Gathered weights, if the model's are sharded.
    """
    state_dict = dict(model.state_dict() if state_dict is None else state_dict)
    for name, layer in language_lora_layers(model).items():
        merged, _ = _merged_weight(name, layer, state_dict)
        bias = state_dict.get(f"{name}.base_layer.bias")
        for key in [key for key in state_dict if key.startswith(f"{name}.")]:
            del state_dict[key]
        state_dict[f"{name}.weight"] = merged
        if bias is not None:
            state_dict[f"{name}.bias"] = bias
    return state_dict


def _lora_keys(model: nn.Module) -> dict[str, str]:
    """The model's keys of the adapters, by their keys in the file."""
    suffix = f".{ADAPTER}.weight"
    return {
        f"{name}.lora_{part}.weight": f"{name}.lora_{part}{suffix}"
        for name in language_lora_layers(model)
        for part in "AB"
    }


def save_language_lora(model: nn.Module, path: Path, state_dict: Mapping[str, torch.Tensor] | None = None) -> None:
    """
    Save the adapters as safetensors: `{layer}.lora_A.weight` `(rank, in_features)` and `{layer}.lora_B.weight`
    `(out_features, rank)`.

    Args:
        model (`nn.Module`): The student.
        path (`Path`): The file.
        state_dict (`Mapping[str, torch.Tensor]`, *optional*): Gathered weights, if the model's are sharded.
    """
    state_dict = model.state_dict() if state_dict is None else state_dict
    tensors = {key: state_dict[own].detach().cpu().contiguous() for key, own in _lora_keys(model).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


@torch.no_grad()
def load_language_lora(model: PreTrainedModel, folder: str | Path) -> None:
    """
    Load a checkpoint of a run with LoRA: the adapters from their file, all other trained weights from
    `model*.safetensors`. The frozen weights under the adapters stay, and must be those of the checkpoint.

    Raises:
        ValueError: if adapters, weights or the frozen weights do not fit the model.
    """
    folder = Path(folder)
    own, layers = model.state_dict(), language_lora_layers(model)
    _load_adapters(own, _lora_keys(model), folder / LANGUAGE_LORA_NAME)
    seen: set[str] = set()
    unknown: list[str] = []
    distances: dict[str, float] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for key in weights.keys():
                seen.add(key)
                name, _, kind = key.rpartition(".")
                if name in layers and kind == "weight":
                    distances[name] = _difference(name, layers[name], own, weights.get_tensor(key))
                    continue
                live = f"{name}.base_layer.{kind}" if name in layers else key
                if live in own:
                    own[live].copy_(weights.get_tensor(key))
                else:
                    unknown.append(key)
    published = {key for key in own if not key.startswith("distiller.")}
    published = {key for key in published if not any(key.startswith(f"{name}.") for name in layers)}
    published |= {f"{name}.weight" for name in layers}
    missing = sorted(published - seen - set(model.all_tied_weights_keys))
    if missing or unknown:
        raise ValueError(
            f"{folder} is not a checkpoint of this model; missing: {missing}, left over: {unknown}. Resume from a "
            "checkpoint of this run."
        )
    if changed := sorted(name for name, distance in distances.items() if not distance <= 1):
        raise ValueError(
            f"The frozen weights under LoRA are not those that {folder} was trained on; {len(changed)} differ: "
            f"{changed}. Resume with the `model_name_or_path` (or `language_model`), the dtype and the "
            "`language_lora_alpha` of the first run, or continue the merged weights as `model_name_or_path`."
        )


def _load_adapters(own: Mapping[str, torch.Tensor], keys: Mapping[str, str], path: Path) -> None:
    if not path.is_file():
        raise ValueError(
            f"{path} is missing, without which LoRA would start again at zero. Resume from a checkpoint that has the "
            "file, or continue its merged weights as `model_name_or_path`."
        )
    adapters = load_file(path)
    saved = {key: tuple(value.shape) for key, value in adapters.items()}
    asked = {key: tuple(own[live].shape) for key, live in keys.items()}
    if differing := {
        key: (saved.get(key), asked.get(key))
        for key in sorted(saved.keys() | asked.keys())
        if saved.get(key) != asked.get(key)
    }:
        raise ValueError(
            f"{path} holds other adapters than this run has (saved, asked): {differing}. Give the saved "
            "`language_lora_rank` and `language_lora_target_modules`."
        )
    for key, live in keys.items():
        own[live].copy_(adapters[key])


def refuse_language_lora(folder: str | Path) -> None:
    """Refuse a checkpoint of a run with LoRA, for a run without."""
    if (Path(folder) / LANGUAGE_LORA_NAME).exists():
        raise ValueError(
            f"{folder} is a checkpoint of a run with LoRA of the language model, but `language_lora_rank` is 0. "
            "Resume with the rank of that run, or continue the merged weights as `model_name_or_path`."
        )


def _difference(name: str, layer: LoraLinear, own: Mapping[str, torch.Tensor], saved: torch.Tensor) -> float:
    """The largest difference of the merged weight from the saved one, in multiples of what rounding explains."""
    merged, delta = _merged_weight(name, layer, own)
    if merged.shape != saved.shape or merged.dtype != saved.dtype:
        return math.inf
    rounding = 2 * torch.finfo(saved.dtype).eps * saved.float().abs() + MERGE_TOLERANCE * delta
    return ((merged.float() - saved.float()).abs() / rounding.clamp(min=torch.finfo(torch.float32).tiny)).max().item()
