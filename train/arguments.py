"""The arguments of the training commands besides the trainer's: the data, the student to continue, and the parser."""

import argparse
from dataclasses import dataclass, fields
from typing import Literal

from transformers.hf_argparser import HfArg
from trl import SFTConfig, TrlParser

from train.config import MoveKDSFTConfig


@dataclass
class DataArguments:
    """The data to train on. The `help` of each field describes it."""

    dataset_name: list[str] = HfArg(
        help="LLaVA JSON files, Parquet files or folders, `save_to_disk` folders, or Hub ids. In YAML an entry may be "
        "a mapping with `name`, `weight`, `image_folder`, `subset` and `split`; with weights the data sets are mixed "
        "in these proportions, without weights they are concatenated."
    )
    mixture_stopping_strategy: Literal["first_exhausted", "all_exhausted"] = HfArg(
        default="first_exhausted",
        help="When a weighted mixture ends: with its first data set, so that no row repeats, or with its last. A "
        "streamed mixture never ends: each data set starts again.",
    )
    dataset_train_split: str = HfArg(default="train", help="Split to train on.")
    dataset_test_split: str = HfArg(default="test", help="Split to evaluate on, if `eval_strategy` is set.")
    validation_share: float = HfArg(
        default=0.0, help="Share of the rows to hold back and evaluate on, in place of `dataset_test_split`."
    )
    image_folder: str | None = HfArg(default=None, help="Folder that the image paths in the data are relative to.")
    streaming: bool = HfArg(default=False, help="Read rows as they are needed. Requires `max_steps`.")
    shuffle_buffer_size: int = HfArg(
        default=1000, help="Rows in the buffer that a stream is shuffled with, for each data set; 0 keeps the order."
    )
    max_bad_row_share: float = HfArg(
        default=0.01, help="Stop if more than this share of the rows (of a stream: of the run's rows) is unusable."
    )
    max_bad_rows: int | None = HfArg(default=None, help="Stop if more than this number of rows is unusable.")

    def __post_init__(self) -> None:
        if not 0 <= self.validation_share < 1:
            raise ValueError(f"`validation_share` is {self.validation_share}. Set it to 0 or more, and below 1.")


@dataclass
class ModelArguments:
    """The student to continue and how to load it. The `help` of each field describes it."""

    model_name_or_path: str | None = HfArg(
        default=None, help="Saved student, with its distillation heads, to continue: a Hub id or a folder."
    )
    model_revision: str | None = HfArg(default=None, help="Branch, tag or commit of `model_name_or_path` on the Hub.")
    dtype: str = HfArg(
        default="float32",
        help="Data type to load the weights in.",
        metadata={"choices": ["float32", "bfloat16", "float16", "auto"]},
    )
    attn_implementation: str | None = HfArg(
        default=None, help="Attention implementation: `sdpa`, `eager`, `flex_attention` or `flash_attention_2`."
    )


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, except those that are `None`: their `help` says what is done then."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def _text_or_none(text: str) -> str | None:
    """An empty value on the command line unsets what the recipe says."""
    return text or None


class TrainingParser(TrlParser):
    """
    Parser of a recipe and of the flags that override it. `--help` lists this project's options first.

    Args:
        prog (`str`): The command, for the help.
        *more (`type`): Further dataclasses of options.
    """

    def __init__(self, prog: str, *more: type) -> None:
        super().__init__(
            (DataArguments, MoveKDSFTConfig, ModelArguments, *more),
            prog=prog,
            usage=f"{prog} [--config RECIPE.yaml] [options]",
            description="An option stands in the recipe or on the command line, which overrides the recipe.",
            formatter_class=_Formatter,
        )
        for action in self._actions:
            if action.type is str and action.default is None and action.nargs is None:
                action.type = _text_or_none

    def format_help(self) -> str:
        own = {name for options in self.dataclass_types for name in options.__annotations__}
        inherited = {field.name for field in fields(SFTConfig)} - own
        sections = {
            "options of MoVE-KD": [action for action in self._actions if action.dest not in inherited],
            "options of TRL's SFTConfig and transformers' TrainingArguments": [
                action for action in self._actions if action.dest in inherited
            ],
        }
        formatter = self.formatter_class(prog=self.prog)
        formatter.add_usage(self.usage, [], [])
        formatter.add_text(self.description)
        for heading, actions in sections.items():
            formatter.start_section(heading)
            formatter.add_arguments(actions)
            formatter.end_section()
        return formatter.format_help()
