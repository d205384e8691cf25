"""What is refused before anything is sent."""

import json
import shutil
from configparser import ConfigParser
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hub import push as push_script
from hub import push_checkpoint
from hub.card_facts import EvaluationResult, read_evaluation, weights_fingerprint
from hub.push_allowlist import checkpoint_files
from hub.push_validate import load
from modeling_movekd import __version__
from tests.helpers.cards import RESULT
from tests.helpers.conversions import BAD_WEIGHTS, change_weight
from tests.helpers.exported import STAYS
from tests.helpers.hub_server import OWNER_TOKEN


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint to spoil."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def spoil_code(folder: Path) -> None:
    with (folder / "vision_movekd.py").open("a") as file:
        file.write("import os\n")


def edit(folder: Path, name: str, *keys: str, value) -> None:
    content = json.loads((folder / name).read_text())
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    (folder / name).write_text(json.dumps(content))


def link(folder: Path) -> None:
    target = folder.parent / "private.json"
    target.write_text("{}")
    (folder / "vocab.json").symlink_to(target)


def only_pickles(folder: Path) -> None:
    torch.save({"weight": torch.ones(1)}, folder / "pytorch_model.bin")
    for path in folder.glob("model.safetensors*"):
        path.unlink()


def index(name: str):
    def write(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"weight": name}}))

    return write


REFUSED = {
    "changed code": (spoil_code, "vision_movekd.py differs from this package's vision_movekd.py"),
    "foreign code": (
        lambda folder: (folder / "helper.py").write_text(""),
        "helper.py is code that is not of this package",
    ),
    "foreign auto_map": (
        lambda folder: edit(folder, "config.json", "auto_map", "AutoModel", value="stranger/repo--model.Model"),
        "`auto_map` of .*stranger/repo--model.Model.* only",
    ),
    "nested auto_map": (
        lambda folder: edit(folder, "config.json", "text_config", "auto_map", value={"AutoConfig": "a.B"}),
        "`text_config.auto_map` of .*config.json is",
    ),
    "processor's auto_map": (
        lambda folder: edit(folder, "tokenizer_config.json", "auto_map", value={"AutoTokenizer": "a.B"}),
        "`auto_map` of .*tokenizer_config.json is",
    ),
    "no auto_map": (lambda folder: edit(folder, "config.json", "model_type", value="llama"), "is of a 'llama' model"),
    "link out of the folder": (link, "vocab.json is a link to .*private.json, outside of the folder"),
    "pickles alone": (only_pickles, "no weights as safetensors, only pickles: .*'pytorch_model.bin'"),
    "index out of the folder": (index("../other.safetensors"), r"names \['../other.safetensors'\]"),
    "index without its file": (index("model-00009-of-00009.safetensors"), "which are not there"),
    "two sets of weights": (
        lambda folder: (
            shutil.copy(folder / "model.safetensors", folder / "model-00001-of-00001.safetensors"),
            (folder / "model.safetensors.index.json").write_text(
                '{"weight_map": {"weight": "model-00001-of-00001.safetensors"}}'
            ),
        ),
        "both model.safetensors and model.safetensors.index.json",
    ),
    "a token in the card": (
        lambda folder: (folder / "README.md").write_text(f"Use {OWNER_TOKEN}."),
        "README.md holds an access token",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_nobody_should_load_is_refused(copy: Path, case: str, capsys) -> None:
    spoil, message = REFUSED[case]
    spoil(copy)
    with pytest.raises(SystemExit, match=f"(?s)error: .*{message}") as error:
        push_script.main([str(copy), "org/refused", "--dry-run"])
    assert OWNER_TOKEN not in str(error.value) + "".join(capsys.readouterr())


def test_code_of_a_foreign_auto_map_never_runs(copy: Path) -> None:
    edit(copy, "config.json", "auto_map", "AutoConfig", value="evil.Config")
    (copy / "evil.py").write_text(f"open({str(copy / 'ran')!r}, 'w')")
    with pytest.raises(SystemExit, match="evil.py is code"):
        push_script.main([str(copy), "org/refused", "--dry-run"])
    assert not (copy / "ran").exists()


def test_folders_of_this_machine_are_not_published(copy: Path, tmp_path: Path) -> None:
    edit(copy, "config.json", "text_config", "_name_or_path", value="/home/somebody/vicuna")
    stage = tmp_path / "stage"
    push_checkpoint._stage(copy, stage, None, 10**9)
    assert json.loads((stage / "config.json").read_text())["text_config"]["_name_or_path"] == "vicuna"


def test_one_file_of_weights_is_published_with_its_index(copy: Path, tmp_path: Path) -> None:
    """Checkpoints of earlier versions have none, and one of weights that were replaced since is out of date."""
    index = copy / "model.safetensors.index.json"
    index.unlink()
    for stage in (tmp_path / "none", tmp_path / "old"):
        push_checkpoint._stage(copy, stage, None, 10**9)
        found = json.loads((stage / index.name).read_text())["weight_map"]
        assert found == dict.fromkeys(load_file(copy / "model.safetensors"), "model.safetensors")
        index.write_text('{"weight_map": {"old": "model.safetensors"}}')
    assert "old" in index.read_text(), "the checkpoint's own stays"


def test_an_evaluation_is_published_with_the_fingerprint_of_the_shards(copy: Path, tmp_path: Path) -> None:
    evaluation = {"results": [RESULT], "weights": weights_fingerprint(copy)}
    (copy / "evaluation.json").write_text(json.dumps(evaluation))
    stage = tmp_path / "stage"
    push_checkpoint._stage(copy, stage, None, 50_000)
    assert len(list(stage.glob("model-*.safetensors"))) > 1
    assert read_evaluation(stage) == read_evaluation(copy) == [EvaluationResult(**RESULT)]
    assert json.loads((copy / "evaluation.json").read_text()) == evaluation, "the checkpoint's own stays"


def test_pictures_for_the_card_are_published_and_no_others(copy: Path) -> None:
    names = (
        "assets/answers.png",
        "assets/one.webp",
        "assets/a b.png",
        "assets/data.json",
        "pictures/step-0/01-image.png",
    )
    for name in names:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(b"")
    chosen, left = checkpoint_files(copy)
    assert set(names[:2]) <= set(chosen) and set(names[2:]) <= set(left)


def test_results_by_others_pass_and_ours_are_of_these_weights(copy: Path, tmp_path: Path) -> None:
    """Also beside a card that its owner wrote."""
    (copy / ".eval_results" / "folder").mkdir(parents=True)
    for name in ("evaluation.yaml", "hle_with_tools.yaml", "log.txt", "folder/hle.yaml"):
        (copy / ".eval_results" / name).write_text("[]")
    card = "library_name: transformers\npipeline_tag: image-text-to-text\ntags: [movekd]"
    (copy / "README.md").write_text(f"---\n{card}\n---\nMine.")
    push_checkpoint._stage(copy, stage := tmp_path / "stage", None, 10**9)
    push_checkpoint._write_card(copy, stage, False, "me/student", None)
    assert {path.name for path in (stage / ".eval_results").iterdir()} == {"evaluation.yaml", "hle_with_tools.yaml"}
    assert "task_id: ocr" in (stage / ".eval_results" / "evaluation.yaml").read_text()
    assert (copy / ".eval_results" / "evaluation.yaml").read_text() == "[]", "the checkpoint's own stays"
    (stage / "evaluation.json").unlink()
    (copy / "evaluation.json").unlink()
    push_checkpoint._write_card(copy, stage, False, "me/student", None)
    assert not (stage / ".eval_results" / "evaluation.yaml").exists()


def test_the_tag_is_the_version_of_the_package() -> None:
    setup = ConfigParser(interpolation=None)
    setup.read(Path(__file__).parents[2] / "setup.cfg")
    assert setup["metadata"]["version"] == __version__


def test_pickles_beside_the_weights_stay(checkpoint: Path) -> None:
    chosen, left = checkpoint_files(checkpoint)
    assert {"optimizer.pt", "training_args.bin", "rng_state.pth"} <= set(left) and set(STAYS) <= set(left)
    assert not set(STAYS) & set(chosen)


@pytest.mark.parametrize("kind", BAD_WEIGHTS)
def test_values_that_no_weight_has(copy: Path, tmp_path: Path, kind: str) -> None:
    """Checked before the process of its own, which does not read the values of a large model."""
    change, message = BAD_WEIGHTS[kind]
    change_weight(copy, "model.vision_tower.pre_layrnorm.weight", change)
    with pytest.raises(ValueError, match=f"pre_layrnorm.weight` of .*{message}"):
        push_checkpoint._stage(copy, tmp_path / "stage", None, 10**9)


def lose_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.vision_tower.pre_layrnorm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def add_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors") | {"model.another": torch.ones(1)}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lose_weight, "pre_layrnorm.weight"),
        (add_weight, "unexpected keys: .*model.another"),
        (
            lambda folder: edit(folder, "config.json", "image_token_index", value=3),
            "image token is 259, the model's 3",
        ),
        (lambda folder: (folder / "chat_template.jinja").unlink(), "no chat template"),
        (lambda folder: edit(folder, "config.json", "vision_config", "image_size", value=20), "20"),
        (lambda folder: edit(folder, "config.json", "image_aspect_ratio", value="anyres"), "cuts tiles by the grids"),
        (
            lambda folder: edit(
                folder, "processor_config.json", "image_processor", "size", value={"shortest_edge": 10**7}
            ),
            "cuts images to .*10000000",
        ),
    ],
)
def test_a_checkpoint_that_does_not_hold_together_is_refused(copy: Path, spoil, message: str) -> None:
    spoil(copy)
    with pytest.raises((ValueError, RuntimeError), match=message):
        load(str(copy), meta=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--create-pr", "--tag"], "A pull request goes to main"),
        (["--create-pr", "--revision", "dev"], "A pull request goes to main"),
        (["--space-hardware", "t4-small"], "do nothing without `--space`"),
        (["--space", "--space-secrets", "NEVER_SET_ANYWHERE"], "NEVER_SET_ANYWHERE'. are not set"),
        (["--space", "--space-variables", "THEME"], "not of the form NAME=VALUE"),
    ],
)
def test_arguments_that_contradict_each_other(checkpoint: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        push_script.main([str(checkpoint), "org/model", *arguments])


def test_a_name_that_is_none_and_a_folder_that_is_not_there(checkpoint: Path) -> None:
    with pytest.raises(SystemExit, match="is no name of a repository"):
        push_script.main([str(checkpoint), "a/b/c"])
    with pytest.raises(SystemExit, match="is no folder"):
        push_script.main([str(checkpoint / "nothing"), "a/b"])
