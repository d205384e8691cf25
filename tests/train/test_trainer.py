"""Training: exactly the parameters of the stage change, and every term is in the loss and in the log."""

import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    TrainerCallback,
)

from modeling_movekd import MoveKDForConditionalGeneration
from modeling_movekd.chat_templates import adds_bos
from tests.helpers.colored_rows import llava_rows
from tests.helpers.own_templates import OWN_TEMPLATES
from tests.helpers.trainers import build_trainer
from train import run as stage_run
from train.build import (
    build_collator,
    build_distiller,
    build_student,
    build_teachers,
    fit_feature_statistics,
    parameter_groups,
)
from train.cache_writer import processor_of_recipe
from train.data.bad_rows import BadRows
from train.data.datasets import load_conversations
from train.trainer import MoveKDTrainer


FIXTURES = Path(__file__).parents[1] / "fixtures"
TOKENIZER = FIXTURES / "parity" / "conversation" / "tokenizer"
FORMER_TEMPLATE = FIXTURES / "chat_templates" / "vicuna_v1_former.jinja"


class Snapshot(TrainerCallback):
    """Keeps a copy of all weights before training."""

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        self.before = {name: value.detach().clone() for name, value in model.named_parameters()}

    def changed(self, model: torch.nn.Module) -> set[str]:
        return {name for name, value in model.named_parameters() if not torch.equal(value, self.before[name])}


def train(*settings, **kwargs) -> MoveKDTrainer:
    trainer = build_trainer(*settings, **kwargs)
    trainer.train()
    return trainer


def entries(trainer: MoveKDTrainer) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "text" in entry]


def is_expert(name: str) -> bool:
    return "expert" in name or "router" in name


@pytest.mark.parametrize("preset", ["paper", "released", "student_heads"])
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_each_stage_trains_its_parameters(arguments, stage: str, preset: str) -> None:
    snapshot, teachers_before = Snapshot(), {}

    def prepare(model, teachers, distiller) -> None:
        for name, teacher in teachers.items():
            teachers_before[name] = {key: value.clone() for key, value in teacher.state_dict().items()}

    trainer = train(*arguments(stage=stage, distillation_preset=preset, max_steps=5), [snapshot], prepare)
    names = set(snapshot.before)
    expected = {name for name in names if "projector" in name or "distiller" in name or is_expert(name)}
    if stage == "finetune":
        expected = names
    if preset == "released":
        # The tower is not cut. Of the unused layer, the balance loss trains the router and what is in front of it
        behind = {
            name for name in names if ".layers.2.mlp" in name and "vision_tower" in name or "post_layernorm" in name
        }
        expected = {name for name in expected if name not in behind or "router" in name}
    # The captions use few words: most rows of the embedding stay, but the parameter as a whole changes
    assert snapshot.changed(trainer.model) == expected
    for name, teacher in trainer.teachers.items():
        assert all(torch.equal(value, teachers_before[name][key]) for key, value in teacher.state_dict().items())
        assert not any(value.requires_grad for value in teacher.parameters())


@pytest.mark.parametrize("preset", ["radio", "eupe", "unic", "theia"])
def test_the_presets_of_other_recipes_train(arguments, preset: str) -> None:
    snapshot = Snapshot()
    trainer = train(*arguments(distillation_preset=preset, stage="pretrain", num_experts=0, max_steps=2), [snapshot])
    logs = trainer.state.log_history[1]
    summaries = {name: logs[name] for name in ("kd/clip/summary", "kd/vit/summary") if name in logs}
    assert len(summaries) == (0 if preset == "theia" else 2)
    assert all(0 < value < logs[name.removesuffix("/summary")] for name, value in summaries.items())
    assert snapshot.changed(trainer.model) == {
        name for name, value in trainer.model.named_parameters() if value.requires_grad
    }


def test_code_that_a_language_model_brings_along_is_neither_run_nor_asked_about(
    arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classes = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "foreign", "auto_map": classes}))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", asked.append)
    with pytest.raises(ValueError, match="`language_model` .* is not run"):
        build_student(*arguments(language_model=str(tmp_path))[1:])
    assert not asked and not (tmp_path / "ran").exists()


def test_a_language_model_without_a_head_is_refused(arguments, parts: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(parts["language"], tmp_path / "language")
    weights = load_file(tmp_path / "language" / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "language" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights, which would be random: \['lm_head.weight'\]"):
        build_student(*arguments(language_model=str(tmp_path / "language"))[1:])


def test_a_language_model_with_experts(arguments, parts: dict[str, str], tmp_path: Path) -> None:
    """The language model's own balance loss is refused; without it the model trains."""
    tokenizer = AutoTokenizer.from_pretrained(parts["language"])
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 16}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**size, **experts, vocab_size=len(tokenizer)))
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "language")
    with pytest.raises(ValueError, match="`router_aux_loss_coef` is 0.001, but .* Set it to 0"):
        train(*arguments(language_model=str(tmp_path / "language")))
    snapshot = Snapshot()
    trainer = train(*arguments(language_model=str(tmp_path / "language"), router_aux_loss_coef=0.0), [snapshot])
    assert snapshot.changed(trainer.model) == set(snapshot.before)


def test_loss_is_the_weighted_sum_of_its_terms(arguments) -> None:
    _, args, _ = settings = arguments(lambda_kd=0.3, lambda_balance=0.2)
    trainer = train(*settings)
    for entry in entries(trainer):
        assert {"kd/clip", "kd/vit", "mean_token_accuracy", "images_per_second"} <= entry.keys()
        total = entry["text"] + args.lambda_kd * entry["kd"] + args.lambda_balance * entry["balance"]
        assert entry["loss"] == pytest.approx(total, rel=1e-5)
        assert sum(entry[f"experts/{index}"] for index in range(3)) == pytest.approx(1)


def test_text_loss_is_the_models_own(arguments) -> None:
    settings = arguments(max_steps=1, learning_rate=0.0, lora_dropout=0.0)
    batches = []

    class Spy(TrainerCallback):
        def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs) -> None:
            batches.append(next(iter(train_dataloader)))

    trainer = train(*settings, callbacks=[Spy()])
    model, _ = build_student(*settings[1:])
    batch = {name: batches[0][name] for name in ("input_ids", "attention_mask", "labels", "pixel_values")}
    # The loader shuffles each pass, so compare the mean over the data at a learning rate of zero
    losses = []
    for rows in trainer.get_train_dataloader():
        rows = {name: rows[name] for name in batch}
        losses.append((model(**rows).loss * (rows["labels"][:, 1:] != -100).sum()).item())
    tokens = sum((rows["labels"][:, 1:] != -100).sum().item() for rows in trainer.get_train_dataloader())
    evaluated = trainer.evaluate(trainer.train_dataset)
    assert evaluated["eval_text"] == pytest.approx(sum(losses) / tokens, rel=1e-3)


def test_distillation_changes_what_the_tower_learns(arguments) -> None:
    with_kd = train(*arguments(lora_dropout=0.0))
    without = train(*arguments(lora_dropout=0.0, distill=False, teachers=None))
    key = "model.vision_tower.encoder.layers.0.mlp.fc1.weight"
    assert not torch.equal(with_kd.model.state_dict()[key], without.model.state_dict()[key])
    assert not any(name.startswith("kd") for entry in entries(without) for name in entry)
    assert not hasattr(without.model, "distiller")


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
@pytest.mark.parametrize("frozen", [True, False])
def test_plain_llava(arguments, stage: str, frozen: bool) -> None:
    snapshot = Snapshot()
    settings = {"distill": False, "teachers": None, "num_experts": 0, "freeze_vision_tower": frozen, "stage": stage}
    trainer = train(*arguments(**settings), [snapshot])
    expected = {name for name in snapshot.before if "projector" in name}
    if stage == "finetune":
        expected |= {name for name in snapshot.before if "vision_tower" not in name or not frozen}
    assert snapshot.changed(trainer.model) == expected
    assert not any(is_expert(name) for name in snapshot.before)


def test_tower_and_language_model_have_their_own_learning_rates(arguments) -> None:
    own = {"vision_tower_learning_rate": 5e-5, "language_model_learning_rate": 2e-4}
    trainer = train(*arguments(**own, weight_decay=0.1, max_steps=1))
    names = {id(value): name for name, value in trainer.model.named_parameters()}
    rates = {
        names[id(value)]: group["initial_lr"] for group in trainer.optimizer.param_groups for value in group["params"]
    }
    assert len(rates) == len(names)
    for name, rate in rates.items():
        is_language = "language_model" in name or "lm_head" in name
        assert rate == (5e-5 if "vision_tower" in name else 2e-4 if is_language else 1e-3), name
    assert set(rates.values()) == {5e-5, 2e-4, 1e-3}
    for own_rate in own.values():
        groups = [group for group in trainer.optimizer.param_groups if group["initial_lr"] == own_rate]
        assert {group["weight_decay"] for group in groups} == {0.0, 0.1}


def test_teachers_called_as_parts_of_the_student(arguments, parts: dict[str, str]) -> None:
    teachers = [{"name": "clip", "model": parts["clip"]}]
    teachers += [{"name": name, "model": parts["vit"]} for name in ("vision_tower", "language_model", "lm_head")]
    trainer = build_trainer(*arguments(stage="pretrain", teachers=teachers, vision_tower_learning_rate=5e-5))
    distiller = dict(trainer.model.distiller.named_parameters())
    assert {name.split(".")[0] for name in distiller} == {"vision_tower", "language_model", "lm_head"}
    assert all(value.requires_grad for value in distiller.values())
    trained, frozen = parameter_groups(trainer.model)
    assert trained["distiller"] == sum(value.numel() for value in distiller.values()) and "distiller" not in frozen
    groups = trainer.create_optimizer().param_groups
    rates = {id(value): group["lr"] for group in groups for value in group["params"]}
    assert {rates[id(value)] for value in distiller.values()} == {1e-3}


@pytest.mark.parametrize("settings", [{"stage": "pretrain"}, {"language_lora_rank": 4}])
def test_a_rate_of_a_frozen_language_model_is_refused(arguments, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="own weights do not train"):
        arguments(**settings, language_model_learning_rate=1e-4)


def test_saved_folder(arguments, tmp_path: Path) -> None:
    trainer = stage_run.train(*arguments(save_strategy="steps", save_steps=2))
    for folder in (tmp_path / "output", tmp_path / "output" / "checkpoint-2"):
        with safe_open(folder / "model.safetensors", "pt") as file:
            keys = set(file.keys())
        assert not any("distiller" in key or "teacher" in key for key in keys)
        loaded = MoveKDForConditionalGeneration.from_pretrained(folder)
        assert set(loaded.state_dict()) == keys | {"lm_head.weight"}
        heads = load_file(folder / "distiller.safetensors")
        assert {key.rsplit(".", 1)[0] for key in heads} == {"vit.channels", "vit.tokens"}
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == dict.fromkeys(keys, "model.safetensors"), "engines would load the distiller too"
        facts = json.loads((folder / "training_facts.json").read_text())
        assert facts["knobs"]["head_side"] == "teacher" and facts["losses"]["text"] > 0
        assert [teacher["name"] for teacher in facts["teachers"]] == ["clip", "vit"]
        assert (folder / "processor_config.json").is_file() and (folder / "modeling_movekd.py").is_file()
    live, saved = trainer.model.distiller.state_dict(), load_file(tmp_path / "output" / "distiller.safetensors")
    assert live.keys() == saved.keys() and all(torch.equal(value, saved[key]) for key, value in live.items())
    assert not torch.equal(saved["vit.channels.weight"], heads["vit.channels.weight"]), "of the step before"


OF_OTHER_RECIPES = {
    "distillation_preset": "student_heads",
    "head_form": "mlp",
    "feature_normalization": "phi_s",
    "grid_matching": "upsample",
    "distillation_loss": "cosine_smooth_l1",
    "cosine_share": 0.5,
    "teacher_dropping": 0.5,
}


@pytest.mark.parametrize(
    "options", [{"distillation_preset": "paper"}, {"distillation_preset": "student_heads"}, OF_OTHER_RECIPES]
)
def test_second_stage_continues_student_and_distiller(arguments, tmp_path: Path, options: dict[str, Any]) -> None:
    first = stage_run.train(*arguments(stage="pretrain", **options))
    assert all(entry["kd"] > 0 for entry in entries(first))
    snapshot = Snapshot()
    train(
        *arguments(
            stage="finetune",
            **options,
            model_name_or_path=str(tmp_path / "output"),
            output_dir=str(tmp_path / "second"),
        ),
        [snapshot],
    )
    for name, value in first.model.named_parameters():
        torch.testing.assert_close(snapshot.before[name], value.detach(), msg=name)


def test_continuing_asks_nothing(arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would ask at the terminal whether to run the code beside a checkpoint, and wait."""
    for part in build_student(*arguments()[1:]):
        part.save_pretrained(tmp_path / "saved")
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question="": asked.append(question) or "n")
    _, processor = build_student(*arguments(model_name_or_path=str(tmp_path / "saved"))[1:])
    assert not asked and processor.tokenizer.convert_tokens_to_ids("<image>") == processor.image_token_id


def test_other_teachers_need_new_heads(arguments, parts: dict[str, str], tmp_path: Path, caplog) -> None:
    stage_run.train(*arguments(stage="pretrain", max_steps=1, distillation_preset="student_heads"))
    continued: dict[str, Any] = {
        "model_name_or_path": str(tmp_path / "output"),
        "output_dir": str(tmp_path / "second"),
    }
    continued |= {"teachers": [{"name": "another", "model": parts["vit"]}], "distillation_preset": "student_heads"}
    with pytest.raises(ValueError, match=r"does not fit the distiller: missing \['another.*`reset_distiller: true`"):
        stage_run.train(*arguments(**continued))
    trainer = stage_run.train(*arguments(**continued, reset_distiller=True, max_steps=1))
    assert list(trainer.model.distiller) == ["another"] and "starts with new heads" in caplog.text
    with pytest.raises(ValueError, match="`reset_distiller` is true, but no student or encoder is continued"):
        stage_run.train(*arguments(reset_distiller=True, output_dir=str(tmp_path / "third")))


@pytest.mark.parametrize("image_aspect_ratio", ["pad", "anyres"])
def test_a_continued_student_sees_the_pixels_of_a_new_one(arguments, tmp_path: Path, image_aspect_ratio: str) -> None:
    built = build_student(*arguments(image_aspect_ratio=image_aspect_ratio)[1:])
    for part in built:
        part.save_pretrained(tmp_path / "saved")
    settings = arguments(model_name_or_path=str(tmp_path / "saved"), image_aspect_ratio=image_aspect_ratio)[1:]
    image = Image.effect_mandelbrot((83, 47), (-2, -1.5, 1, 1.5), 100).convert("RGB")
    pixels = built[1].image_processor(image, return_tensors="pt")["pixel_values"]
    for processor in (build_student(*settings)[1], processor_of_recipe(*settings)):
        assert type(processor.image_processor) is type(built[1].image_processor)
        assert torch.equal(processor.image_processor(image, return_tensors="pt")["pixel_values"], pixels)


def test_statistics_count_usable_rows_alone(arguments, tmp_path: Path) -> None:
    """Whatever comes first: the sample is the usable rows in the run's order, as if there were no others."""
    rows = llava_rows(24)
    spoiled = [dict(row) for row in rows]
    for index in range(0, 24, 2):
        spoiled[index] = rows[index] | {"image": [rows[index]["image"]] * 40}
        spoiled[index]["conversations"] = [
            {"from": "human", "value": "<image>\n" * 40 + "What colour are they?"},
            rows[index]["conversations"][1],
        ]
    for row in spoiled[1::2]:
        row["image"] = [row["image"]]
    Dataset.from_list(spoiled).save_to_disk(tmp_path / "spoiled")
    data_args, args, model_args = arguments(
        dataset_name=str(tmp_path / "spoiled"),
        distillation_preset="student_heads",
        feature_statistics_images=12,
        max_length=300,
    )
    model, processor = build_student(args, model_args)
    teachers = build_teachers(args)
    found = []
    for source in (spoiled, spoiled[1::2]):
        distiller = build_distiller(args, model, teachers)
        bad_rows = BadRows(max_share=1)
        dataset = load_conversations(Dataset.from_list(source), bad_rows=bad_rows)
        fit_feature_statistics(args, distiller, teachers, dataset, build_collator(args, processor, teachers), bad_rows)
        found.append({name: value for name, value in distiller.state_dict().items() if name.endswith("mean")})
        assert bool(bad_rows.reasons) is (source is spoiled)
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], msg=name)


def test_continuing_with_other_settings_raises(arguments, tmp_path: Path) -> None:
    stage_run.train(*arguments(stage="pretrain", max_steps=1))
    with pytest.raises(ValueError, match=r"'lora_rank': \(4, 8\)"):
        stage_run.train(
            *arguments(model_name_or_path=str(tmp_path / "output"), output_dir=str(tmp_path / "second"), lora_rank=8)
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_aspect_ratio": "anyres"}, r"'image_aspect_ratio': \('pad', 'anyres'\)"),
        ({"cut_tower": False}, r"'cut_tower': \(True, False\)"),
        ({"chat_template": "plain"}, "`chat_template` is 'plain', but .* was saved with 'vicuna_v1'.*Set it to 'own'"),
    ],
)
def test_a_continued_student_keeps_what_it_was_built_with(
    arguments, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    for part in build_student(*arguments()[1:]):
        part.save_pretrained(tmp_path / "saved")
    saved = {"model_name_or_path": str(tmp_path / "saved")}
    with pytest.raises(ValueError, match=message):
        build_student(*arguments(**saved, **settings)[1:])
    _, processor = build_student(*arguments(**saved, chat_template="own")[1:])
    assert processor.chat_template == build_student(*arguments(**saved)[1:])[1].chat_template


@pytest.mark.parametrize("max_length", [16, 32, 48])
def test_a_run_that_trains_no_token_stops(arguments, max_length: int) -> None:
    """Each of its rows is a bad row that names `max_length`, however many may be bad."""
    data, args, model_args = arguments(max_length=max_length, max_steps=1, distill=False, teachers=[])
    with pytest.raises(ValueError, match=rf"(?s)rows cannot be used.*max_length {max_length}"):
        stage_run.train(data, args, model_args)
    data.max_bad_row_share = 1.0
    with pytest.raises(ValueError, match=rf"No token is trained in step 1, .* 4 rows: .*max_length {max_length}"):
        stage_run.train(data, args, model_args)


@pytest.mark.parametrize("name", ["qwen3", "llama3", "gemma", "mistral"])
def test_both_stages_train_with_the_language_model_s_own_template(
    arguments, parts: dict[str, str], tmp_path: Path, name: str
) -> None:
    language = shutil.copytree(parts["language"], tmp_path / "language")
    tokenizer = AutoTokenizer.from_pretrained(language)
    tokenizer.chat_template = OWN_TEMPLATES[name]
    tokenizer.save_pretrained(language)
    common = {"chat_template": "own", "max_steps": 1, "distill": False, "teachers": []}
    first = arguments(stage="pretrain", language_model=str(language), vision_model=parts["clip"], **common)
    stage_run.train(*first)
    second = arguments(model_name_or_path=str(tmp_path / "output"), output_dir=str(tmp_path / "second"), **common)
    trainer = stage_run.train(*second)
    assert entries(trainer)[0]["text"] > 1
    collated = trainer.data_collator([trainer.train_dataset[0]])
    answer = trainer.processing_class.decode(collated["labels"][0][collated["labels"][0] != -100])
    assert trainer.train_dataset[0]["messages"][1]["content"][0]["text"] in answer
    assert collated["input_ids"][0].tolist().count(tokenizer.bos_token_id) == 1
    processor = AutoProcessor.from_pretrained(tmp_path / "second", trust_remote_code=False)
    assert processor.chat_template == trainer.processing_class.chat_template


@pytest.mark.parametrize("chat_template", ["own", "vicuna_v1"])
def test_a_continued_student_of_an_earlier_release(arguments, tmp_path: Path, chat_template: str) -> None:
    """Its tokenizer added the beginning-of-sequence token and padded right. The ids stay, the files are today's."""
    model, processor = build_student(*arguments()[1:])
    former = PreTrainedTokenizerFast.from_pretrained(TOKENIZER, padding_side="right")
    former.add_special_tokens({"extra_special_tokens": ["<image>"]})
    processor.tokenizer = former
    processor.chat_template = former.chat_template = FORMER_TEMPLATE.read_text(encoding="utf-8")
    folder = str(tmp_path / "former")
    model.save_pretrained(folder)
    assert GenerationConfig.from_pretrained(folder).suppress_tokens == [processor.image_token_id]
    processor.save_pretrained(folder)
    image = {"type": "image", "image": Image.new("RGB", (9, 9))}
    messages = [
        {"role": "user", "content": [image, {"type": "text", "text": "What colour is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Red."}]},
    ]
    before = processor.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    settings = arguments(model_name_or_path=folder, chat_template=chat_template)
    _, processor = build_student(*settings[1:])
    assert processor.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"] == before
    rendered = processor.apply_chat_template(messages)
    for add_special_tokens in (True, False):
        inputs = processor(text=rendered, images=image["image"], add_special_tokens=add_special_tokens)
        assert inputs["input_ids"] == before
    processor.save_pretrained(tmp_path / "saved")
    saved = AutoProcessor.from_pretrained(tmp_path / "saved", trust_remote_code=False)
    assert saved.tokenizer.padding_side == "left" and not adds_bos(saved.tokenizer)


@pytest.mark.parametrize("preset", ["paper", "released"])
@pytest.mark.parametrize("image_aspect_ratio", ["pad", "anyres"])
def test_rows_without_and_with_several_images(arguments, tmp_path: Path, preset: str, image_aspect_ratio: str) -> None:
    rows = llava_rows(24, text_only=(0, 1, 2, 3, 5, 11, 12, 13, 14, 15))
    for row in rows:
        row["image"] = [row["image"]] if row["image"] is not None else None
    rows[4]["image"] *= 2
    rows[4]["conversations"][0]["value"] = "<image>\n<image>\nWhat colour are they?"
    Dataset.from_list(rows).save_to_disk(tmp_path / "mixed")
    settings = arguments(
        dataset_name=str(tmp_path / "mixed"),
        distillation_preset=preset,
        image_aspect_ratio=image_aspect_ratio,
        group_by_modality_length=True,
        max_steps=6,
        max_length=None,
    )
    trainer = train(*settings)
    history = entries(trainer)
    text_only = [entry for entry in history if "kd" not in entry]
    # Batches without images distill nothing, except that `released` distills black images
    assert len(text_only) == (0 if preset == "released" else 2)
    assert all(entry["loss"] == pytest.approx(entry["text"], rel=1e-5) for entry in text_only)


def test_activation_checkpointing_gives_the_same_run(arguments) -> None:
    plain, checkpointed = (
        train(*arguments(lora_dropout=0.0, activation_checkpointing=value)) for value in (False, True)
    )
    for one, other in zip(entries(plain), entries(checkpointed), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    for (name, one), (_, other) in zip(
        plain.model.named_parameters(), checkpointed.model.named_parameters(), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=name)


def test_evaluation_logs_the_same_terms(arguments, dataset_folder: str) -> None:
    data_args, args, model_args = arguments(eval_strategy="steps", eval_steps=3)
    data_args.validation_share = 0.2
    trainer = stage_run.train(data_args, args, model_args)
    evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluated) == 1
    assert {"eval_text", "eval_kd", "eval_kd/vit", "eval_balance", "eval_experts/0"} <= evaluated[0].keys()


@pytest.mark.parametrize("preset", ["paper", "student_heads"])
def test_bfloat16_stays_close_to_float32(arguments, preset: str) -> None:
    settings = {"distillation_preset": preset, "lora_dropout": 0.0, "lambda_kd": 1.0}
    single, half = (train(*arguments(**settings, bf16=value)) for value in (False, True))
    for one, other in zip(entries(single), entries(half), strict=True):
        for term in ("loss", "text", "kd", "kd/vit", "balance"):
            assert other[term] == pytest.approx(one[term], rel=0.05), term
    assert all(value.dtype == torch.float32 for value in half.model.parameters())


def test_a_stopped_worker_ends_the_run(arguments) -> None:
    trainer = build_trainer(*arguments(dataloader_num_workers=1, dataloader_timeout=2))
    collate = trainer.data_collator

    def stop_at_the_second_batch(rows: list[dict[str, Any]]) -> dict[str, Any]:
        stop_at_the_second_batch.batches += 1
        if stop_at_the_second_batch.batches == 2:
            os.kill(os.getpid(), signal.SIGSTOP)
        return collate(rows)

    stop_at_the_second_batch.batches = 0
    trainer.data_collator = stop_at_the_second_batch
    with pytest.raises(RuntimeError, match="gave no batch for 2 seconds.*`dataloader_timeout`"):
        trainer.train()
    for worker in multiprocessing.active_children():
        worker.join(timeout=10)
    assert not multiprocessing.active_children()
