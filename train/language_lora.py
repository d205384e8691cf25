"""
LoRA of the language model, while the experts, routers, projector and distillation heads are trained in full.

PEFT puts the adapters inside the language model, so that the student stays its own class, with TRL's fused head, the
training forward and the saving that go with it. What is published at every save is the merged model; the adapters have
a file of their own beside it, from which training resumes exactly. The frozen weights they are added to are not saved:
a resumed run takes them from where the first one did, and checks that they are the same.
"""

import math
import os
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


LANGUAGE_LORA_NAME = "language_lora.safetensors"
ADAPTER = "default"  # PEFT's name for the only adapter
# How far a merged weight may be from the saved one, in parts of the largest change that LoRA makes to it: as much as a
# matrix product in TF32 differs from one in float32
MERGE_TOLERANCE = 2e-3


def add_language_lora(model: PreTrainedModel, args: MoveKDSFTConfig) -> None:
    """
    Put LoRA into the language model, as [`inject_language_lora`] does, and pack the weights under it if asked to.

    With `load_in_4bit` the weights under the adapters, and no others, become 4-bit NormalFloat (QLoRA, arXiv
    2305.14314) on the device of the run. Quantising the modules here, and not the whole model while it loads, keeps
    the model from being marked as quantised, upon which TRL would cast all that trains, experts and heads included, to
    bfloat16, and transformers would save packed weights that nothing of ours could be merged into.

    Args:
        model: The student, loaded.
        args: With `language_lora_rank` above 0.

    Raises:
        ValueError: if a target names no linear layer, or 4-bit weights are asked for without the package, or under
            DeepSpeed or FSDP.
    """
    inject_language_lora(model, args)
    if args.load_in_4bit:
        _quantize(list(language_lora_layers(model).values()), args)


def inject_language_lora(model: PreTrainedModel, args: MoveKDSFTConfig) -> None:
    """
    LoRA on weights as they are, at its start without effect (B = 0). The adapters are float32, also on weights of
    lower precision, and depend on the seed alone. Arguments and errors as above.
    """
    language_model = model.model.language_model
    targets = args.language_lora_target_modules
    if targets is not None:
        names = [name for name, _ in language_model.named_modules()]
        if unknown := [part for part in targets if not any(f".{name}".endswith(f".{part}") for name in names)]:
            linear = {name.rsplit(".", 1)[-1] for name, part in language_model.named_modules() if _is_linear(part)}
            raise ValueError(
                f"`language_lora_target_modules` names {unknown}, which {type(language_model).__name__} does not "
                f"have. Its linear layers are called {sorted(linear)}."
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
        raise ValueError(f"LoRA here is for linear layers; {unsupported} are not. Choose other target modules.")


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def _quantize(layers: list[LoraLinear], args: MoveKDSFTConfig) -> None:
    """Replace the frozen weights under the adapters by 4-bit ones, on the device of the run."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise ValueError(
            "`load_in_4bit` needs the package bitsandbytes, which is not installed: `pip install bitsandbytes`, or "
            "set `load_in_4bit: false`."
        ) from error
    # Known before the processes have met; FSDP spreads packed weights, DeepSpeed loses track of them when it saves
    if args.deepspeed_plugin is not None or os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true"):
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
        # On a CPU it would change to a format for inference in bfloat16 at the first evaluation, and not back
        packed.support_avx512bf16_for_cpu = False
        layer.base_layer = packed.to(args.device)


def language_lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """The layers of the student that carry LoRA, by the name their weights are published under."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLinear)}


def language_lora_facts(model: nn.Module, args: MoveKDSFTConfig) -> dict[str, Any] | None:
    """What a model card needs to say about it; `None` without LoRA."""
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
    The weight of a layer with LoRA added to it, `(out_features, in_features)`, in the data type of the weight before
    it was packed, and the largest change in it. W + alpha / rank * B A, summed in float32.
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
    The student's weights with LoRA merged into them, under the keys of a student without LoRA. The live weights are
    left as they are; 4-bit weights are unpacked.

    Args:
        model: The student.
        state_dict: Gathered weights, where the model's own are spread over processes.
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
    """The model's keys of LoRA, by the keys they have in the file."""
    suffix = f".{ADAPTER}.weight"
    return {
        f"{name}.lora_{part}.weight": f"{name}.lora_{part}{suffix}"
        for name in language_lora_layers(model)
        for part in "AB"
    }


def save_language_lora(model: nn.Module, path: Path, state_dict: Mapping[str, torch.Tensor] | None = None) -> None:
    """
    Write the adapters, unmerged, as safetensors: `{layer}.lora_A.weight` `(rank, in_features)` and
    `{layer}.lora_B.weight` `(out_features, rank)`; under a temporary name first.

    Args:
        model: The student.
        path: The file, `language_lora.safetensors` by custom.
        state_dict: Gathered weights, where the model's own are spread over processes.
    """
    state_dict = model.state_dict() if state_dict is None else state_dict
    tensors = {key: state_dict[own].detach().cpu().contiguous() for key, own in _lora_keys(model).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


@torch.no_grad()
def load_language_lora(model: PreTrainedModel, folder: str | Path) -> None:
    """
    Load a checkpoint of a run with LoRA: the adapters from their file, everything else that is not under an adapter
    from `model.safetensors` (or its shards). The frozen weights under the adapters stay as they were loaded; with the
    adapters added they have to be the checkpoint's.

    Raises:
        ValueError: if the adapters' file is missing or another model's; if weights are missing or left over; if the
            frozen weights are not those that the checkpoint was trained on.
    """
    folder = Path(folder)
    path = folder / LANGUAGE_LORA_NAME
    if not path.is_file():
        raise ValueError(
            f"{path} is missing: LoRA of the language model would start again at zero. Resume from a checkpoint that "
            "has it, or continue its merged weights as `model_name_or_path`."
        )
    own, layers, keys = model.state_dict(), language_lora_layers(model), _lora_keys(model)
    adapters = load_file(path)
    shapes = {key: tuple(value.shape) for key, value in adapters.items()}
    expected = {key: tuple(own[live].shape) for key, live in keys.items()}
    if shapes != expected:
        differing = {
            key: (shapes.get(key), expected.get(key))
            for key in sorted(shapes.keys() | expected.keys())
            if shapes.get(key) != expected.get(key)
        }
        raise ValueError(
            f"{path} holds other adapters than this run has (saved, asked): {differing}. Give the saved "
            "`language_lora_rank` and `language_lora_target_modules`."
        )
    for key, live in keys.items():
        own[live].copy_(adapters[key])

    files = sorted(folder.glob("model*.safetensors"))
    seen: set[str] = set()
    unknown: list[str] = []
    distances: dict[str, float] = {}
    for file in files:
        with safe_open(file, framework="pt") as weights:
            for key in weights.keys():
                seen.add(key)
                name = key.removesuffix(".weight")
                if name in layers:
                    distances[name] = _difference(name, layers[name], own, weights.get_tensor(key))
                elif (live := _live_key(key, layers)) in own:
                    own[live].copy_(weights.get_tensor(key))
                else:
                    unknown.append(key)
    published = {key for key in own if not key.startswith("distiller.")}
    published = {key for key in published if not any(key.startswith(f"{name}.") for name in layers)}
    published |= {f"{name}.weight" for name in layers}
    missing = sorted(published - seen - set(model.all_tied_weights_keys))
    if missing or unknown:
        raise ValueError(f"{folder} is not a checkpoint of this model; missing: {missing}, left over: {unknown}.")
    if changed := sorted(name for name, distance in distances.items() if not distance <= 1):
        raise ValueError(
            f"The frozen weights under LoRA are not those that {folder} was trained on; {len(changed)} differ: "
            f"{changed}. Resume with the `model_name_or_path` (or `language_model`), the data type and the "
            "`language_lora_alpha` of the first run, or continue the checkpoint's merged weights as "
            "`model_name_or_path`."
        )


def refuse_language_lora(folder: str | Path) -> None:
    """
    Raises:
        ValueError: if the checkpoint is one of a run with LoRA; for a run without.
    """
    if (Path(folder) / LANGUAGE_LORA_NAME).exists():
        raise ValueError(
            f"{folder} is a checkpoint of a run with LoRA of the language model, but `language_lora_rank` is 0. "
            "Resume with the rank of that run, or continue the checkpoint's merged weights as `model_name_or_path`."
        )


def _live_key(key: str, layers: Mapping[str, LoraLinear]) -> str:
    """Where a published weight is in the model: biases lie with the frozen weight, under the adapter."""
    name, _, kind = key.rpartition(".")
    return f"{name}.base_layer.{kind}" if name in layers else key


def _difference(name: str, layer: LoraLinear, own: Mapping[str, torch.Tensor], saved: torch.Tensor) -> float:
    """How far the merged weight is from the saved one, in parts of what rounding explains."""
    merged, delta = _merged_weight(name, layer, own)
    if merged.shape != saved.shape or merged.dtype != saved.dtype:
        return math.inf
    rounding = 2 * torch.finfo(saved.dtype).eps * saved.float().abs() + MERGE_TOLERANCE * delta
    return ((merged.float() - saved.float()).abs() / rounding.clamp(min=torch.finfo(torch.float32).tiny)).max().item()
