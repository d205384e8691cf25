"""What tests of tiny random models share: weights that show, and a tokenizer of bytes."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerFast, SiglipVisionConfig


VOCABULARY = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}


@torch.no_grad()
def spread(module: nn.Module, seed: int) -> None:
    """Draw every weight wide enough that a layer, a norm or a bias left out shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(0.2 * noise if parameter.dim() > 1 else parameter + 0.1 * noise)


def clip_config(**kwargs) -> CLIPVisionConfig:
    """Three layers over 4 x 4 patches; `kwargs` are more fields of the configuration, or other values."""
    return CLIPVisionConfig(**SIZES | {"num_hidden_layers": 3, "image_size": 16, "patch_size": 4} | kwargs)


def siglip_config(**kwargs) -> SiglipVisionConfig:
    """As above; one pixel a side is left over, as in SigLIP's so400m-patch14-384."""
    return SiglipVisionConfig(**SIZES | {"num_hidden_layers": 3, "image_size": 17, "patch_size": 4} | kwargs)


def llama_config(**kwargs) -> LlamaConfig:
    """Two layers over `VOCABULARY`; `kwargs` as above."""
    ids = {"vocab_size": len(VOCABULARY), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return LlamaConfig(**SIZES | {"num_hidden_layers": 2} | ids | kwargs)


def make_tokenizer(**kwargs: str) -> PreTrainedTokenizerFast:
    """One token a byte."""
    vocabulary = {token: index for index, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special_tokens = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special_tokens, **kwargs)
