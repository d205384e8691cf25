"""`--help` of the training commands."""

from dataclasses import fields

from trl import SFTConfig

from train.arguments import TrainingParser
from train.config import PRESETS, DataArguments, ModelArguments, MoveKDSFTConfig


def test_help_lists_our_options_first_each_with_a_sentence_and_its_values_by_preset():
    parser = TrainingParser("accelerate launch train/sft.py")
    text = " ".join(parser.format_help().split())
    ours, trls = text.split("options of TRL's SFTConfig and transformers' TrainingArguments:")
    assert text.startswith("usage: accelerate launch train/sft.py [--config RECIPE.yaml] [options] ")
    helps = {action.dest: action.help for action in parser._actions}
    for options in (DataArguments, ModelArguments, MoveKDSFTConfig):
        for name in options.__annotations__:
            assert f" --{name} " in ours or f" --{name}, " in ours, name
            assert len(helps[name].split()) > 3, name
    for name in {field.name for field in fields(SFTConfig) if field.init} - set(MoveKDSFTConfig.__annotations__):
        assert f" --{name}" in trls and f" --{name} " not in ours, name
    for preset, options in PRESETS.items():
        assert all(f"{preset} {value}" in helps[name] for name, value in options.items())


def test_a_wrong_argument_is_answered_in_two_lines(capsys):
    try:
        TrainingParser("accelerate launch train/sft.py").parse_args(["--dataset_name", "x", "--stage", "both"])
    except SystemExit as stop:
        assert stop.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "--stage: invalid choice: 'both'" in lines[1]
