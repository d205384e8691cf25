"""`--help` of the training commands."""

from dataclasses import fields, replace
from pathlib import Path

import pytest
from trl import SFTConfig

from train.arguments import (
    CacheArguments,
    DataArguments,
    ModelArguments,
    TrainingParser,
    UnpreparedConfig,
    check_arguments,
)
from train.config import PRESETS, MoveKDSFTConfig
from train.installed import read_class
from train.options import MethodOptions


ROOT = Path(__file__).parents[2]


def test_help_lists_our_options_first_each_with_a_sentence_and_its_values_by_preset():
    parser = TrainingParser("accelerate launch train/sft.py")
    text = " ".join(parser.format_help().split())
    ours, trls = text.split("options of TRL's SFTConfig and transformers' TrainingArguments:")
    assert text.startswith("usage: accelerate launch train/sft.py [--config RECIPE.yaml] [options] ")
    helps = {action.dest: action.help for action in parser._actions}
    for options in (DataArguments, ModelArguments, MethodOptions):
        for name in options.__annotations__:
            assert f" --{name} " in ours or f" --{name}, " in ours, name
            assert len(helps[name].split()) > 3, name
    for name in {field.name for field in fields(SFTConfig) if field.init} - set(MethodOptions.__annotations__):
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


def test_an_empty_value_unsets_a_key_of_the_recipe(tmp_path):
    parser = TrainingParser("accelerate launch train/sft.py")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model_name_or_path: a/b\nvision_model: c/d\nfeature_cache: e\nimage_folder: f\n")
    arguments = ["--config", str(recipe), "--dataset_name", "x", "--distill", "false", "--bf16", "false"]
    arguments += ["--use_cpu", "true", "--output_dir", str(tmp_path), "--model_name_or_path", "", "--vision_model="]
    data_args, args, model_args = parser.parse_args_and_config([*arguments, "--image_folder", ""])
    assert model_args.model_name_or_path is None and args.vision_model is None and data_args.image_folder is None
    assert args.feature_cache == "e"


def test_trackers_and_resuming_on_the_command_line_and_in_a_recipe(tmp_path):
    parser = TrainingParser("accelerate launch train/sft.py")
    common = ["--dataset_name", "x", "--distill", "false", "--bf16", "false", "--use_cpu", "true"]
    common += ["--output_dir", str(tmp_path)]

    def parse(*arguments: str, recipe: str = "") -> MoveKDSFTConfig:
        (tmp_path / "recipe.yaml").write_text(recipe or "seed: 1")
        return parser.parse_args_and_config(["--config", str(tmp_path / "recipe.yaml"), *common, *arguments])[1]

    assert parse().report_to == [] and parse(recipe="report_to: none").report_to == []
    assert parse("--report_to", "tensorboard", "trackio").report_to == ["tensorboard", "trackio"]
    assert parse("--report_to", "tensorboard", recipe="report_to: trackio").report_to == ["tensorboard"]
    assert parse("--report_to", "trackio", "--trackio_space_id", "me/runs").trackio_space_id == "me/runs"
    assert parse(recipe="report_to: [tensorboard, trackio]").report_to == ["tensorboard", "trackio"]
    for value, expected in (
        ("true", True),
        ("True", True),
        ("false", None),
        ("runs/checkpoint-2", "runs/checkpoint-2"),
    ):
        assert parse("--resume_from_checkpoint", value).resume_from_checkpoint == expected
        assert parse(recipe=f"resume_from_checkpoint: {value}").resume_from_checkpoint == expected
    assert (
        parse("--resume_from_checkpoint", "false", recipe="resume_from_checkpoint: true").resume_from_checkpoint
        is None
    )


def test_a_share_of_a_loss_that_is_not_mixed_is_refused(tmp_path):
    common = {"output_dir": str(tmp_path), "bf16": False, "teachers": ["clip"], "cosine_share": 0.5}
    assert MoveKDSFTConfig(**common, distillation_loss="cosine_smooth_l1").cosine_share == 0.5
    args = MoveKDSFTConfig(**common | {"cosine_share": None})
    assert replace(args, seed=7).cosine_share == 0.9, "what the preset has filled in is accepted again"
    with pytest.raises(ValueError, match="`cosine_share` is 0.5, but `distillation_loss` 'mse' has no share"):
        MoveKDSFTConfig(**common)


def test_defaults_warn_of_nothing(tmp_path, recwarn):
    args = MoveKDSFTConfig(str(tmp_path), distill=False, bf16=False)
    assert args.activation_checkpointing is True
    assert not MoveKDSFTConfig(
        str(tmp_path), distill=False, bf16=False, activation_checkpointing=False
    ).gradient_checkpointing
    assert not [str(warning.message) for warning in recwarn if issubclass(warning.category, FutureWarning)]


def test_the_parser_without_torch_has_the_real_one_s_options():
    """The fields that are read from the libraries' source are those of the imported classes."""
    assert SFTConfig not in UnpreparedConfig.__mro__
    parsers = TrainingParser("x", CacheArguments, config=UnpreparedConfig), TrainingParser("x", CacheArguments)
    names = ("option_strings", "dest", "nargs", "const", "default", "required", "help", "metavar")
    read, real = (
        [
            {name: getattr(action, name) for name in names}
            | {"choices": action.choices and [*action.choices], "type": getattr(action.type, "__name__", None)}
            for action in parser._actions
        ]
        for parser in parsers
    )
    assert read == real


def test_a_class_that_cannot_be_read_is_imported(tmp_path, monkeypatch):
    (tmp_path / "odd_library.py").write_text("globals()['Odd'] = type('Odd', (), {'size': 3})\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert read_class("odd_library", "Odd").size == 3


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("stage: both", "`stage` is 'both'; choose one of"),
        ("num_expert: 1", "unknown keys: num_expert (did you mean num_experts?)"),
        ("num_experts: many", "argument --num_experts/--num-experts: invalid int value: 'many'"),
        ("- a list", "is no mapping of options"),
        ("a: [", "cannot be read"),
        ("global_batch_size: 9", "`global_batch_size` is 9, no multiple of 8 rows"),
        ("{stage: encoder, teachers: [clip], max_length: 7}", "where {'max_length': 7} do nothing"),
    ],
)
def test_a_wrong_recipe_is_refused(tmp_path, capsys, recipe: str, message: str):
    (tmp_path / "recipe.yaml").write_text(recipe)
    with pytest.raises(SystemExit) as stop:
        check_arguments("x", ["--config", str(tmp_path / "recipe.yaml"), "--dataset_name", "x", "--output_dir", "y"])
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("recipe", sorted((ROOT / "train" / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_pass(recipe):
    check_arguments("x", ["--config", str(recipe)], loads=False)
