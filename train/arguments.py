"""The command line of training: this project's options first, then those of TRL and transformers."""

import argparse
from dataclasses import fields

from trl import SFTConfig, TrlParser

from train.config import DataArguments, ModelArguments, MoveKDSFTConfig


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
