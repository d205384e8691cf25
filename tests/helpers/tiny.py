"""What tests of tiny random models share: weights that show, and a tokenizer of bytes."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast


VOCABULARY = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]


@torch.no_grad()
def spread(module: nn.Module, seed: int) -> None:
    """Draw every weight wide enough that a layer, a norm or a bias left out shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(0.2 * noise if parameter.dim() > 1 else parameter + 0.1 * noise)


def make_tokenizer(**kwargs: str) -> PreTrainedTokenizerFast:
    """One token a byte."""
    vocabulary = {token: index for index, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special_tokens = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special_tokens, **kwargs)
