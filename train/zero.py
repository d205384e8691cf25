"""What DeepSpeed's ZeRO needs beside its configuration."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config


@contextmanager
def whole_weights(args: TrainingArguments) -> Iterator[None]:
    """
    Load models in here as on a single process, whole, also where ZeRO-3 will partition the student later.

    Once arguments for ZeRO-3 exist, transformers partitions every model from its construction on, whatever
    `zero3_init_flag` says. Towers, though, are cut, copied and checked as whole tensors; the frozen teachers must stay
    whole, since no engine ever gathers them; and a single process may load a model for itself.
    """
    plugin = args.deepspeed_plugin
    if plugin is None:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        plugin.set_deepspeed_weakref()
