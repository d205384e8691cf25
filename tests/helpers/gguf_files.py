"""llama.cpp's files: a language model written without its converter, and a projector file computed as it does."""

from pathlib import Path

import gguf
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM


LLAMA_NAMES = {
    "model.embed_tokens.": "token_embd.",
    "model.norm.": "output_norm.",
    "lm_head.": "output.",
    "model.layers.": "blk.",
    "input_layernorm.": "attn_norm.",
    "post_attention_layernorm.": "ffn_norm.",
    "self_attn.q_proj.": "attn_q.",
    "self_attn.k_proj.": "attn_k.",
    "self_attn.v_proj.": "attn_v.",
    "self_attn.o_proj.": "attn_output.",
    "mlp.gate_proj.": "ffn_gate.",
    "mlp.up_proj.": "ffn_up.",
    "mlp.down_proj.": "ffn_down.",
}


def write_llama(model: LlamaForCausalLM, path: Path) -> None:
    """A language model in float32 with its token ids; the tokens' texts are made up."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>"] + [f"t{index}" for index in range(3, config.vocab_size)])
    writer.add_token_scores([0.0] * config.vocab_size)
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    writer.add_token_types(kinds + [gguf.TokenType.NORMAL] * (config.vocab_size - 3))
    writer.add_add_bos_token(False)
    for key, tensor in model.state_dict().items():
        tensor = tensor.float()
        if key.endswith(("q_proj.weight", "k_proj.weight")):
            # llama.cpp rotates neighboring channels, transformers the two halves
            tensor = tensor.view(-1, 2, config.head_dim // 2, config.hidden_size).transpose(1, 2).reshape(tensor.shape)
        for theirs, name in LLAMA_NAMES.items():
            key = key.replace(theirs, name)
        writer.add_tensor(key, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """The keys with their values, and the tensors in float32, in torch's order of dimensions."""
    reader = gguf.GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {
        tensor.name: torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in reader.tensors
    }
    return keys, tensors


def image_embeddings(path: Path, pixels: Tensor, cls_first: bool) -> Tensor:
    """
    What llama.cpp's LLaVA graph computes from a projector file, `(batch_size, num_patches, width)`.

    Args:
        cls_first (`bool`): Whether [CLS] comes before the patches, as the positions and rows of the graph assume.
    """
    keys, tensors = read_gguf(path)
    layers, eps = keys["clip.vision.feature_layer"], keys["clip.vision.attention.layer_norm_epsilon"]
    heads, patch_size = keys["clip.vision.attention.head_count"], keys["clip.vision.patch_size"]

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"], eps)

    patches = F.conv2d(pixels, tensors["v.patch_embd.weight"], stride=patch_size).flatten(2).transpose(1, 2)
    cls = tensors["v.class_embd"].expand(len(pixels), 1, -1)
    x = torch.cat([cls, patches] if cls_first else [patches, cls], dim=1) + tensors["v.position_embd.weight"]
    states = [norm(x, "v.pre_ln")]
    for index in range(layers[-1]):
        block, x = f"v.blk.{index}", states[-1]
        inputs = norm(x, f"{block}.ln1")
        query, key, value = (
            linear(inputs, f"{block}.attn_{part}").unflatten(-1, (heads, -1)).transpose(1, 2) for part in "qkv"
        )
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x = x + linear(attended, f"{block}.attn_out")
        inner = linear(norm(x, f"{block}.ln2"), f"{block}.ffn_up")
        inner = F.gelu(inner, approximate="tanh") if keys["clip.use_gelu"] else inner * torch.sigmoid(1.702 * inner)
        states.append(x + linear(inner, f"{block}.ffn_down"))
    features = torch.cat([states[layer] for layer in layers], dim=-1)[:, 1:]
    return linear(F.gelu(linear(features, "mm.0"), approximate="tanh"), "mm.2")
