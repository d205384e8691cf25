"""The facts of a run for its model card: everything a reader needs, and nothing about the machine."""

import getpass
import json
import re
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from huggingface_hub import ModelCard

from hub.card_facts import code_revision
from hub.card_write import check_card, is_generated, write_card
from modeling_movekd.files import cached_commit
from tests.helpers.colored_rows import llava_rows
from tests.helpers.trainers import SMALL_RUN, build_trainer
from train import run as stage_run
from train.arguments import DataArguments, ModelArguments
from train.config import MoveKDSFTConfig
from train.model_card import facts_folder, noted_license, run_facts, teacher_facts, training_facts, update_card
from train.teachers.config import resolve_teacher


TOKEN = "hf_thisIsASecretToken"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("facts")


@pytest.fixture(scope="module")
def stages(folder: Path, parts: dict[str, str]) -> tuple[Path, Path]:
    """Two stages of two steps: the first on a mixture with a bad row and an evaluation, the second continues it."""
    for name, text in (("clip", "license: mit"), ("language", "license: llama2")):
        shutil.copytree(parts[name], folder / name)
        (folder / name / "README.md").write_text(f"---\n{text}\n---\nA model.\n")
    Dataset.from_list(llava_rows(20)).save_to_disk(folder / "colors")
    rows = [{"conversations": row["conversations"]} for row in llava_rows(12, text_only=tuple(range(12)))]
    rows[3] = {"conversations": "broken"}
    (folder / "more.json").write_text(json.dumps(rows))
    settings: dict[str, Any] = SMALL_RUN | {
        "teachers": [{"name": "clip", "model": str(folder / "clip")}, {"model": parts["vit"], "license": "bsd"}],
        "max_steps": 2,
        "hub_token": TOKEN,
        "hub_model_id": "somebody/student",
    }
    names: Any = [{"name": str(folder / "colors"), "weight": 3}, {"name": str(folder / "more.json"), "weight": 1}]
    parts_of_first = {"vision_model": str(folder / "clip"), "language_model": str(folder / "language")}
    stage_run.train(
        DataArguments(names, validation_share=0.3, max_bad_row_share=0.1),
        MoveKDSFTConfig(
            str(folder / "first"), stage="pretrain", eval_strategy="steps", eval_steps=2, **parts_of_first, **settings
        ),
        ModelArguments(),
        recipe=str(folder / "recipes" / "small.yaml"),
    )
    stage_run.train(
        DataArguments([str(folder / "colors")]),
        MoveKDSFTConfig(str(folder / "second"), save_strategy="steps", save_steps=1, **settings),
        ModelArguments(str(folder / "first")),
    )
    return folder / "first", folder / "second"


def facts_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "training_facts.json").read_text())


def test_first_stage(stages: tuple[Path, Path]) -> None:
    facts = facts_of(stages[0])
    expected = {
        "stage": "pretrain",
        "recipe": "small.yaml",
        "distillation_preset": "paper",
        "steps": 2,
        "seed": 42,
        "processes": 1,
        "backend": "one process",
        "precision": "no",
        "dtype": "float32",
        "bad_rows": 1,
        "global_batch_size": 4,
        "license": None,
        "feature_cache": None,
        "vision_model": "clip",
        "language_model": "language",
    }
    assert {name: facts[name] for name in expected} == expected
    none = {"subset": None, "split": "train", "revision": None}
    assert facts["data"] == [{"name": "colors", "weight": 3} | none, {"name": "more.json", "weight": 1} | none]
    assert facts["base_models"] == [
        {"role": "vision_model", "model": "clip", "revision": None, "license": "mit"},
        {"role": "language_model", "model": "language", "revision": None, "license": "llama2"},
    ]
    assert re.fullmatch("[0-9a-f]{64}", facts["vision_fingerprint"])
    assert [(entry["name"], entry["model"], entry["license"]) for entry in facts["teachers"]] == [
        ("clip", "clip", "mit"),
        ("vit", "vit", "bsd"),
    ]
    assert facts["hyperparameters"]["lora_rank"] == 4 and facts["hyperparameters"]["max_steps"] == 2
    assert {"loss", "text", "kd", "kd/clip", "kd/vit", "balance"} <= facts["losses"].keys()
    assert facts["validation"] == "0.3 of the rows, held back" and facts["evaluation"]["rows"] > 0
    assert facts["evaluation"]["metrics"]["eval_text"] > 0
    assert facts["code"] == code_revision()
    assert facts["seconds"] > 0 and {"torch", "trl", "python"} <= facts["versions"].keys()


def test_second_stage_carries_the_first_along(stages: tuple[Path, Path]) -> None:
    first, second = (facts_of(folder) for folder in stages)
    assert second["base_models"] == first.pop("base_models")
    assert second["vision_fingerprint"] == first["vision_fingerprint"]
    assert second["earlier_stages"] == [first]
    assert (second["stage"], second["recipe"], second["evaluation"]) == ("finetune", None, None)
    assert facts_of(stages[1] / "checkpoint-1")["steps"] == 1
    checkpoint = str(stages[1] / "checkpoint-1")
    args = MoveKDSFTConfig(str(stages[1]), distill=False, bf16=False, resume_from_checkpoint=checkpoint)
    again = run_facts(DataArguments([checkpoint]), args, ModelArguments(str(stages[1])), [])
    assert [stage["stage"] for stage in again.known["earlier_stages"]] == ["pretrain", "finetune"]
    assert again.seconds_before == facts_of(Path(checkpoint))["seconds"] > 0


def test_a_checkpoint_of_which_the_license_alone_is_known_is_the_base_model(
    tmp_path: Path,
) -> None:
    (tmp_path / "training_facts.json").write_text('{"license": "cc-by-nc-4.0"}')
    args = MoveKDSFTConfig(str(tmp_path / "next"), distill=False, bf16=False)
    known = run_facts(DataArguments(["colors"]), args, ModelArguments(str(tmp_path)), []).known
    assert known["license"] == "cc-by-nc-4.0" and known["earlier_stages"] == []
    assert [(model["role"], model["model"]) for model in known["base_models"]] == [("checkpoint", tmp_path.name)]


def test_card_of_every_save(stages: tuple[Path, Path]) -> None:
    for folder in (*stages, stages[1] / "checkpoint-1", stages[1] / "checkpoint-2"):
        check_card(folder / "README.md")
        card = ModelCard.load(folder / "README.md")
        assert is_generated(folder / "README.md") and "generated_from_trainer" not in card.content
        assert card.data.license == "llama2" and {"teacher:clip", "teacher:vit"} < set(card.data.tags)
        # Local folders are not Hub ids
        assert card.data.base_model is None and card.data.datasets is None
        assert 'from_pretrained("somebody/student", revision="main", trust_remote_code=True)' in card.text
    assert re.findall(r"### Stage (.*)", card.text) == ["1: `pretrain`", "2: `finetune`"]
    assert "No benchmark result is recorded" in card.text
    loss = facts_of(stages[1])["losses"]["kd/vit"]
    assert f"`kd/vit` {loss:.4g}" in card.text


def test_nothing_of_the_machine(stages: tuple[Path, Path], folder: Path) -> None:
    files = [path for stage in stages for name in ("training_facts.json", "README.md") for path in stage.rglob(name)]
    assert len(files) == 10
    private = [*folder.parts[1:], str(Path.home()), str(Path.cwd()), socket.gethostname(), TOKEN, getpass.getuser()]
    for path in files:
        text = path.read_text()
        for word in private:
            assert not re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text), (path, word)
        assert not re.search(r"(?<![\w.:/<`])/\w+/", text), path


def test_results_of_older_weights_are_not_claimed(stages: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(stages[0], tmp_path / "run")
    result = {"task": "image-text-to-text", "dataset": "a/b", "split": "test", "metric": "accuracy", "prompt": "none"}
    (tmp_path / "run" / "evaluation.json").write_text(json.dumps({"results": [result | {"value": 0.5}]}))
    update_card(tmp_path / "run", MoveKDSFTConfig(str(tmp_path / "run"), distill=False, bf16=False))
    assert "model-index" not in (tmp_path / "run" / "README.md").read_text()
    assert "model-index" in write_card(tmp_path / "run").read_text()


def test_a_card_of_the_users_stays(stages: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(stages[0], tmp_path / "run")
    (tmp_path / "run" / "README.md").write_text("Mine.")
    update_card(tmp_path / "run", MoveKDSFTConfig(str(tmp_path / "run"), distill=False, bf16=False))
    assert (tmp_path / "run" / "README.md").read_text() == "Mine."


def test_facts_are_of_the_student_that_is_there(arguments) -> None:
    """Also if the trainer was built by hand, and its arguments were not compared with the student."""
    data_args, args, model_args = arguments()

    def ask_for_others(*parts: Any) -> None:
        args.image_aspect_ratio, args.cut_tower = "anyres", False

    trainer = build_trainer(data_args, args, model_args, prepare=ask_for_others)
    trainer.args.trackio_space_id = "me/runs"
    facts = training_facts(trainer, trainer.run_facts, trainer.teachers, 0)
    assert facts["dashboard"] is None
    trainer.args.report_to = ["tensorboard", "trackio"]
    assert training_facts(trainer, trainer.run_facts, trainer.teachers, 0)["dashboard"] == "me/runs"
    assert (facts["hyperparameters"]["image_aspect_ratio"], facts["knobs"]["cut_tower"]) == ("pad", True)


def test_commits_and_licenses_from_the_local_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--owner--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps({"pretrained_cfg": {"license": "apache-2.0"}}))
    assert cached_commit("owner/model") == COMMIT
    assert cached_commit("owner/model", "v2") is None and cached_commit("owner/other") is None
    assert noted_license("owner/model") == "apache-2.0"
    assert facts_folder("owner/model", None) is None and facts_folder(str(tmp_path), None) == tmp_path
    (snapshot / "training_facts.json").write_text("{}")
    assert facts_folder("owner/model", None) == snapshot
    (snapshot / "README.md").write_text("---\nlicense: mit\n---\n")
    assert noted_license("owner/model") == "mit"
    (snapshot / "README.md").write_text("---\n{ no: [yaml\n---\n")
    assert noted_license("owner/model") == "apache-2.0"
    teacher = teacher_facts(resolve_teacher({"model": "owner/model", "loader": "transformers"}))
    assert (teacher["model"], teacher["revision"], teacher["license"]) == ("owner/model", COMMIT, "apache-2.0")
    assert teacher_facts(resolve_teacher("clip"))["revision"].startswith("ce19dc912ca5")
    # The repository behind a timm name, and a revision within a name
    refs = tmp_path / "models--timm--resnet18.a1_in1k" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text(COMMIT[::-1])
    assert teacher_facts(resolve_teacher("resnet18.a1_in1k"))["revision"] == COMMIT[::-1]
    (repository / "refs" / "v2").write_text(COMMIT[::-1])
    assert teacher_facts(resolve_teacher("hf-hub:owner/model@v2"))["revision"] == COMMIT[::-1]


def test_license_by_flag(tmp_path: Path) -> None:
    assert MoveKDSFTConfig(str(tmp_path), distill=False, bf16=False, license="Apache-2.0").license == "apache-2.0"
    with pytest.raises(ValueError, match="`license` is 'mine: yes\\\\n---'"):
        MoveKDSFTConfig(str(tmp_path), distill=False, bf16=False, license="mine: yes\n---")
