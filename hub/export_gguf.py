"""
A checkpoint without experts for llama.cpp: `mmproj.gguf`, the vision tower with the projector, and the language model,
which llama.cpp's own `convert_hf_to_gguf.py` writes.

llama.cpp computes the tower by its LLaVA graph, with the tanh approximation of GELU, and pads an image after resizing
it, where LLaVA pads first. Its releases since May 2025 append [CLS] to the patches, but number positions and rows as
if [CLS] came first (github.com/ggml-org/llama.cpp/issues/25814): each patch has the position of the one before it, the
first patch is lost, and the projected [CLS] takes the last place. `cls_last` rolls the table of positions, so that
such a release computes every patch but the first as the model does.
"""

import shutil
import subprocess
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, BaseImageProcessor, PreTrainedTokenizerBase

from hub.checkpoint_parts import feature_layer
from hub.export_clip import refuse_experts
from modeling_movekd import MoveKDConfig, MoveKDForConditionalGeneration, MoveKDVisionConfig


CONVERTER = "convert_hf_to_gguf.py"
TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
# llama.cpp's only color for padding with this projector: CLIP's mean
PAD_COLOR = (122, 116, 104)
GELUS = ("gelu", "gelu_new", "gelu_pytorch_tanh")
# Our names, and those of llama.cpp's clip.cpp
GGUF_NAMES = {
    "embeddings.class_embedding": "class_embd",
    "embeddings.patch_embedding.": "patch_embd.",
    "embeddings.position_embedding.": "position_embd.",
    "pre_layrnorm.": "pre_ln.",
    "encoder.layers.": "blk.",
    "layer_norm1.": "ln1.",
    "layer_norm2.": "ln2.",
    "self_attn.q_proj.": "attn_q.",
    "self_attn.k_proj.": "attn_k.",
    "self_attn.v_proj.": "attn_v.",
    "self_attn.out_proj.": "attn_out.",
    "mlp.fc1.": "ffn_up.",
    "mlp.fc2.": "ffn_down.",
}


def used_layers(config: MoveKDConfig) -> list[int]:
    """The hidden states that feed the projector, counted from the input of the first layer."""
    layers, depth = feature_layer(config), config.vision_config.num_hidden_layers
    return [layer % (depth + 1) for layer in ([layers] if isinstance(layers, int) else layers)]


def check_gguf(config: MoveKDConfig | MoveKDVisionConfig) -> None:
    """
    Check, before any weights are read, that llama.cpp computes what the model does.

    Raises:
        ValueError: If it would compute something else.
    """
    if not isinstance(config, MoveKDConfig):
        raise ValueError("The checkpoint holds an encoder alone; the form `gguf` needs a whole model.")
    vision, layers = config.vision_config, used_layers(config)
    refuse_experts(vision, "gguf")
    only = {
        "class_token": (vision.class_token, (True,)),
        "image_aspect_ratio": (config.image_aspect_ratio, ("pad",)),
        "vision_feature_select_strategy": (config.vision_feature_select_strategy, ("default",)),
        "projector_hidden_act": (config.projector_hidden_act, GELUS),
        "hidden_act": (vision.hidden_act, ("quick_gelu", *GELUS)),
        "num_channels": (vision.num_channels, (3,)),
        "vision_feature_layer": (layers, (sorted(set(layers)),)),
    }
    for name, (value, supported) in only.items():
        if value not in supported:
            raise ValueError(
                f"The model's `{name}` is {value!r}; the form `gguf` supports {', '.join(map(repr, supported))}. "
                "Choose another form, such as `llava`."
            )


def tower_tensors(model: MoveKDForConditionalGeneration, cls_last: bool) -> dict[str, torch.Tensor]:
    """The tower's layers in use and the projector, under llama.cpp's names."""
    deepest = used_layers(model.config)[-1]
    tensors = {}
    for key, tensor in model.model.vision_tower.state_dict().items():
        part = key.removeprefix("encoder.layers.").split(".")[0]
        if key.startswith("post_layernorm.") or part.isdigit() and int(part) >= deepest:
            continue
        for ours, theirs in GGUF_NAMES.items():
            key = key.replace(ours, theirs)
        tensors[f"v.{key}"] = tensor
    if cls_last:
        tensors["v.position_embd.weight"] = tensors["v.position_embd.weight"].roll(-1, dims=0)
    projector = model.model.multi_modal_projector
    for index, linear in ((0, projector.linear_1), (2, projector.linear_2)):
        tensors[f"mm.{index}.weight"] = linear.weight
        # llama.cpp always adds a bias
        tensors[f"mm.{index}.bias"] = (
            linear.weight.new_zeros(len(linear.weight)) if linear.bias is None else linear.bias
        )
    return tensors


@torch.no_grad()
def write_projector(
    model: MoveKDForConditionalGeneration, image_processor: BaseImageProcessor, path: Path, cls_last: bool = False
) -> None:
    """Write the vision tower and the projector for llama.cpp's `--mmproj`. Vectors and positions are in float32."""
    try:
        import gguf
    except ImportError as error:
        raise ImportError(f"{error}\nThe form `gguf` needs the package: `pip install gguf`.") from error
    color = tuple(int(255 * mean) for mean in image_processor.image_mean)
    if color != PAD_COLOR:
        raise ValueError(
            f"The image processor's mean color is {color}; llama.cpp pads images with {PAD_COLOR}, CLIP's mean. "
            "Choose another form, such as `llava`."
        )
    config, vision, layers = model.config, model.config.vision_config, used_layers(model.config)
    name = TYPES[model.dtype]
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if name == "F32" else f"MOSTLY_{name}"])
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_projection_dim(config.text_config.hidden_size)
    writer.add_vision_image_size(vision.image_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    # Without the layers by name, llama.cpp leaves out the last of `block_count`
    writer.add_vision_block_count(layers[-1])
    writer.add_array("clip.vision.feature_layer", layers)
    writer.add_vision_head_count(vision.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
    writer.add_vision_image_mean(list(image_processor.image_mean))
    writer.add_vision_image_std(list(image_processor.image_std))
    writer.add_vision_use_gelu(vision.hidden_act != "quick_gelu")
    for key, tensor in tower_tensors(model, cls_last).items():
        # llama.cpp's convolution does not take bfloat16
        exact = tensor.dim() == 1 or "position_embd" in key or "patch_embd" in key and name == "BF16"
        kind = gguf.GGMLQuantizationType["F32" if exact else name]
        writer.add_tensor(key, gguf.quants.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_language_model(
    model: MoveKDForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Write the language model alone, as transformers and llama.cpp's converter read it."""
    with torch.device("meta"):
        language = AutoModelForCausalLM.from_config(model.config.text_config, dtype=model.dtype)
    setattr(language, language.base_model_prefix, model.model.language_model)
    language.set_output_embeddings(model.lm_head)
    language.generation_config = model.generation_config
    language.save_pretrained(folder, max_shard_size="5GB")
    tokenizer.save_pretrained(folder)


def convert_language_model(folder: Path, dest: Path, dtype: torch.dtype) -> list[str]:
    """
    Convert the folder of a language model by llama.cpp's converter, if that is on the PATH, and remove the folder.

    Returns:
        Lines to print, with the command to run where the converter is not at hand.
    """
    arguments = ["--outfile", dest.name, "--outtype", TYPES[dtype].lower(), folder.name]
    converter = shutil.which(CONVERTER)
    if converter is None:
        return [
            f"llama.cpp's {CONVERTER} is not on the PATH. Run it in the folder written to get the language model:",
            f"    python llama.cpp/{CONVERTER} {' '.join(arguments)}",
        ]
    result = subprocess.run([converter, *arguments], cwd=folder.parent, capture_output=True, text=True)
    if result.returncode or not dest.is_file():
        lines = (result.stderr or result.stdout).strip().splitlines() or ["no message"]
        raise ValueError(
            f"{converter} cannot convert the language model: {lines[-1].rstrip('.')}. Take it off the PATH to get the "
            "projector, and the folder of the language model to convert by hand."
        )
    shutil.rmtree(folder)
    return [f"{converter} wrote {dest.name}."]
