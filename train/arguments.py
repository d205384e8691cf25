"""
The arguments of the training commands besides the trainer's: the data, the student to continue, and the parser.

Nothing here imports torch, so that arguments are checked at once.
"""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal

import yaml

from train.installed import read_class
from train.options import MethodOptions, option


@dataclass
class DataArguments:
    """The data to train on. The `help` of each field describes it."""

    dataset_name: list[str] = option(
        help="LLaVA JSON files, Parquet files or folders, `save_to_disk` folders, or Hub ids. In YAML an entry may be "
        "a mapping with `name`, `weight`, `image_folder`, `subset` and `split`; with weights the data sets are mixed "
        "in these proportions, without weights they are concatenated."
    )
    mixture_stopping_strategy: Literal["first_exhausted", "all_exhausted"] = option(
        default="first_exhausted",
        help="When a weighted mixture ends: with its first data set, so that no row repeats, or with its last. A "
        "streamed mixture never ends: each data set starts again.",
    )
    dataset_train_split: str = option(default="train", help="Split to train on.")
    dataset_test_split: str = option(default="test", help="Split to evaluate on, if `eval_strategy` is set.")
    validation_share: float = option(
        default=0.0, help="Share of the rows to hold back and evaluate on, in place of `dataset_test_split`."
    )
    image_folder: str | None = option(default=None, help="Folder that the image paths in the data are relative to.")
    streaming: bool = option(default=False, help="Read rows as they are needed. Requires `max_steps`.")
    shuffle_buffer_size: int = option(
        default=1000, help="Rows in the buffer that a stream is shuffled with, for each data set; 0 keeps the order."
    )
    max_bad_row_share: float = option(
        default=0.01, help="Stop if more than this share of the rows (of a stream: of the run's rows) is unusable."
    )
    max_bad_rows: int | None = option(default=None, help="Stop if more than this number of rows is unusable.")

    def __post_init__(self) -> None:
        if not 0 <= self.validation_share < 1:
            raise ValueError(f"`validation_share` is {self.validation_share}. Set it to 0 or more, and below 1.")


@dataclass
class ModelArguments:
    """The student to continue and how to load it. The `help` of each field describes it."""

    model_name_or_path: str | None = option(
        default=None, help="Saved student, with its distillation heads, to continue: a Hub id or a folder."
    )
    model_revision: str | None = option(default=None, help="Branch, tag or commit of `model_name_or_path` on the Hub.")
    dtype: str = option(
        default="float32",
        help="Data type to load the weights in.",
        metadata={"choices": ["float32", "bfloat16", "float16", "auto"]},
    )
    attn_implementation: str | None = option(
        default=None, help="Attention implementation: `sdpa`, `eager`, `flex_attention` or `flash_attention_2`."
    )


@dataclass
class CacheArguments:
    """How features are stored. The `help` of each field describes it."""

    cache_dtype: Literal["float16", "int8"] = option(
        default="float16", help="float16, or int8 with a scale per channel and image."
    )
    rows_per_shard: int = option(default=128, help="Rows with images in each file of a teacher.")

    def __post_init__(self) -> None:
        if self.rows_per_shard < 1:
            raise ValueError(f"`rows_per_shard` is {self.rows_per_shard}. Set it to a positive number.")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, except those that are `None`: their `help` says what is done then."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def _text_or_none(text: str) -> str | None:
    """An empty value on the command line unsets what the recipe says."""
    return text or None


if TYPE_CHECKING:
    from trl import SFTConfig, TrlParser
else:
    SFTConfig, TrlParser = (read_class("trl", name) for name in ("SFTConfig", "TrlParser"))


@dataclass
class UnpreparedConfig(MethodOptions, SFTConfig):
    """The options of [`~train.config.MoveKDSFTConfig`], with those checks that need no torch."""

    def __post_init__(self) -> None:
        self.prepare_options()
        self.check_options()


def _guesses(names: Sequence[str], known: Iterable[str]) -> str:
    """Names that are not known, with those that they may stand for."""
    guesses = [get_close_matches(name.partition("=")[0], [*known], n=1) for name in names]
    return " ".join(
        f"{name} (did you mean {guess[0]}?)" if guess else name for name, guess in zip(names, guesses, strict=True)
    )


class TrainingParser(TrlParser):
    """
    Parser of a recipe and of the flags that override it. `--help` lists this project's options first.

    Args:
        prog (`str`): The command, for the help.
        *more (`type`): Further dataclasses of options.
        config (`type`, *optional*): Dataclass of the trainer's options, [`~train.config.MoveKDSFTConfig`] by default.
    """

    def __init__(self, prog: str, *more: type, config: type | None = None) -> None:
        if config is None:
            from train.config import MoveKDSFTConfig as config
        super().__init__(
            (DataArguments, config, ModelArguments, *more),
            prog=prog,
            usage=f"{prog} [--config RECIPE.yaml] [options]",
            description="An option stands in the recipe or on the command line, which overrides the recipe.",
            formatter_class=_Formatter,
        )
        for action in self._actions:
            if action.type is str and action.default is None and action.nargs is None:
                action.type = _text_or_none

    def check(self, arguments: Sequence[str]) -> list[Any]:
        """
        End with a message if the recipe or the arguments are wrong. [`parse_args_and_config`] may refuse more.

        Returns:
            The dataclasses of options.
        """
        arguments, recipe = list(arguments), {}
        if "--config" in arguments:
            place = arguments.index("--config")
            if len(arguments) == place + 1:
                self.error("argument --config: expected one argument")
            path = arguments[place + 1]
            del arguments[place : place + 2]
            try:
                with open(path, encoding="utf-8") as file:
                    recipe = yaml.safe_load(file)
            except (OSError, UnicodeError, yaml.YAMLError) as error:
                self.error(f"argument --config: {path} cannot be read ({error})")
            if not isinstance(recipe, dict):
                self.error(f"argument --config: {path} is no mapping of options")
            recipe.pop("env", None)
        unknown = self.set_defaults_with_config(**{str(key): value for key, value in recipe.items()})
        if unknown:
            keys = [key.removeprefix("--") for key in unknown[::2]]
            self.error(f"the recipe has unknown keys: {_guesses(keys, [action.dest for action in self._actions])}")
        required = [action for action in self._actions if action.required]
        for action in required:  # a mistyped name is reported before the name that is then missing
            action.required = False
        if unknown := self.parse_known_args(arguments)[1]:
            self.error(f"unrecognized arguments: {_guesses(unknown, self._option_string_actions)}")
        for action in required:
            action.required = True
        given = vars(self.parse_args(arguments))
        try:
            made = [
                options(**{field.name: given[field.name] for field in fields(options) if field.init})
                for options in self.dataclass_types
            ]
        except ValueError as error:
            self.error(str(error))
        return made

    def format_help(self) -> str:
        own = {name for options in self.dataclass_types for name in options.__annotations__} | set(
            MethodOptions.__annotations__
        )
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


def check_arguments(prog: str, arguments: Sequence[str], *more: type, loads: bool = True) -> None:
    """
    End with a message if arguments of a training command are wrong, or with its help, before the imports that take
    seconds.

    Args:
        prog (`str`), *more (`type`): As of [`TrainingParser`].
        arguments (sequence of `str`): The command line.
        loads (`bool`, *optional*, defaults to `True`): Whether the command loads the models, so that they must exist.
    """
    parser = TrainingParser(prog, *more, config=UnpreparedConfig)
    _, args, model_args, *_ = parser.check(arguments)
    from modeling_movekd.files import check_source  # takes a part of a second, which `--help` does not need

    for name in (args.vision_model, args.language_model, model_args.model_name_or_path):
        if loads and name is not None:
            try:
                check_source(name)
            except ValueError as error:
                parser.error(str(error))
