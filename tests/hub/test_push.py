"""Pushing: what leaves the machine, and what others make of it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import parse_eval_result_entries
from safetensors.torch import load as load_bytes
from safetensors.torch import load_file

from hub import push as push_script
from hub.push_allowlist import CODE
from hub.push_validate import load
from modeling_movekd import __version__
from tests.helpers.cards import COMMIT
from tests.helpers.exported import SIZE, STAYS, make_tower
from tests.helpers.hub_client import Client, client
from tests.helpers.hub_server import OWNER_TOKEN, Hub


SECRET = "SecretThatNobodyMaySee"
SPACE_CARD = "---\ntitle: Demo\nsdk: gradio\nsdk_version: 6.31.0\napp_file: app.py\n---\n"


def push(owner: Client, *arguments: str | Path) -> str:
    owner.run("hub.push.main(arguments)", arguments=[str(argument) for argument in arguments])
    return owner.output


@pytest.fixture(scope="module")
def pushed(hub: Hub, owner: Client, checkpoint: Path) -> str:
    return push(owner, checkpoint, "org/model", "--private", "--tag")


def test_only_the_allow_list_is_published_in_one_commit(hub: Hub, pushed: str, checkpoint: Path) -> None:
    repository = hub.repository("org/model")
    files = repository.files()
    expected = {"model.safetensors", "distiller.safetensors", "config.json", "generation_config.json", "README.md"}
    expected |= {"processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    expected |= {"model.safetensors.index.json"}
    facts = {"training_facts.json", "evaluation.json", ".eval_results/evaluation.yaml"}
    assert set(files) == expected | CODE | facts | {".gitattributes"}
    (result,) = parse_eval_result_entries(yaml.safe_load(files[".eval_results/evaluation.yaml"]))
    found = result.dataset_id, result.task_id, result.value, result.dataset_revision, result.date
    assert found == ("lmms-lab/textvqa", "ocr", 0.582, COMMIT, "2026-11-30")
    assert result.notes == "exact_match; with OCR tokens; movekd 0.1.0, lmms-eval 0.7.3"
    assert all(files[name] == (checkpoint / name).read_bytes() for name in expected - {"README.md"})
    assert len(repository.commits) == 2  # that which made it, and ours
    assert repository.private
    assert repository.refs[f"refs/tags/v{__version__}"] == repository.refs["refs/heads/main"]
    for name, content in files.items():
        assert name == ".gitattributes" or re.search(rf"{len(content):,}  {re.escape(name)}\n", pushed), name
    assert "Stays here: .env, checkpoint-3/, data.jsonl" in pushed and "optimizer.pt (a pickle)" in pushed


def test_no_token_leaves_or_is_written(hub: Hub, pushed: str, owner: Client, checkpoint: Path) -> None:
    assert not any(OWNER_TOKEN.encode() in content for content in hub.repository("org/model").files().values())
    own = [
        path
        for path in checkpoint.parent.rglob("*")
        if path.is_file() and str(path.relative_to(checkpoint)) not in STAYS
    ]
    assert len(own) > 10 and not any(OWNER_TOKEN.encode() in path.read_bytes() for path in own)
    assert OWNER_TOKEN not in owner.log and hub.tokens_elsewhere == 0


# `snippet` is the code in the card, which asks about picture.png
STRANGER = f"""
import builtins, os, sys
from PIL import Image
os.chdir(folder)
Image.new("RGB", (40, 24), "red").save("picture.png")
sys.path[:] = [path for path in sys.path if path != root]
def refuse(*questions):
    raise AssertionError(questions)
builtins.input = refuse
exec(snippet)
import torch
assert "modeling_movekd" not in sys.modules and type(model).__module__.startswith("transformers_modules.")
pixels = torch.linspace(-1, 1, 3 * {SIZE}**2).view(1, 3, {SIZE}, {SIZE})
result = [model.model.vision_tower(pixels).last_hidden_state.sum().item(), output[0].tolist()]
assert len(result[1]) > inputs["input_ids"].shape[1] > model.config.image_seq_length
"""


def test_a_stranger_loads_it_by_its_tag_online_and_off(hub: Hub, pushed: str, tmp_path: Path) -> None:
    root = str(Path(__file__).parents[2])
    card = hub.repository("org/model").files()["README.md"].decode()
    snippet = card.split("```python")[1].split("```")[0]
    assert f'"org/model", revision="v{__version__}"' in snippet
    tower = make_tower()
    pixels = torch.linspace(-1, 1, 3 * SIZE**2).view(1, 3, SIZE, SIZE)
    expected = tower(pixels).last_hidden_state.sum().item()
    with client(hub, tmp_path, OWNER_TOKEN) as process:
        online, answer = process.run(STRANGER, root=root, snippet=snippet, folder=str(tmp_path))
    requests = len(hub.requests)
    with client(hub, tmp_path, HF_HUB_OFFLINE="1") as process:
        offline, again = process.run(STRANGER, root=root, snippet=snippet, folder=str(tmp_path))
    assert len(hub.requests) == requests
    assert online == offline == pytest.approx(expected, abs=1e-3) and answer == again


def test_answers_are_known_by_the_commit_that_gave_them(hub: Hub, pushed: str, owner: Client) -> None:
    code = "from transformers.utils import resolve_revision\nfrom modeling_movekd import predict\n"
    code += "result = [predict.identify('org/model', resolve_revision('org/model', name)) for name in (None, tag)]"
    commit = hub.repository("org/model").refs["refs/heads/main"]
    assert owner.run(code, tag=f"v{__version__}") == [f"org/model@{commit}"] * 2


@pytest.mark.slow
def test_nothing_is_sent_twice(hub: Hub, owner: Client, pushed: str, checkpoint: Path) -> None:
    uploads = dict(hub.uploads)
    push(owner, checkpoint, "org/model", "--private", "--tag")
    assert len(hub.repository("org/model").commits) == 2 and dict(hub.uploads) == uploads


@pytest.mark.slow
def test_the_authors_checkpoint_from_the_hub_and_ours_back(
    hub: Hub, owner: Client, original: Path, converted: Path, tmp_path: Path
) -> None:
    vision = original / json.loads((original / "config.json").read_text())["mm_vision_tower"]
    hub.add_folder("org/clip", vision)
    hub.add_folder("authors/release", original)
    code = "import hub.convert; hub.convert.main(['authors/release', dest, '--vision-model', 'org/clip'])"
    owner.run(code, dest=str(tmp_path / "converted"))
    push(owner, tmp_path / "converted", "org/converted")
    files = hub.repository("org/converted").files()
    found, expected = load_bytes(files["model.safetensors"]), load_file(converted / "model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    assert "tokenizer.json" in files and b"org/converted" in files["README.md"]


def test_the_encoder_alone_in_shards_with_its_space(hub: Hub, owner: Client, checkpoint: Path, tmp_path: Path) -> None:
    space = tmp_path / "space"
    (space / "examples").mkdir(parents=True)
    (space / "README.md").write_text(SPACE_CARD)
    (space / "app.py").write_text("print('a demo')\n")
    (space / "examples" / "one.png").write_bytes(b"\x89PNG")
    (space / ".env").write_text(SECRET)
    (space / "__pycache__").mkdir()
    (space / "__pycache__" / "app.py").write_text("")
    code = """
settings = hub.push_commit.SpaceSettings(Path(space), "org/demo", "zero-a10g", {"PASSWORD": secret}, {"THEME": "dark"})
result = hub.push_checkpoint.push(checkpoint, "org/encoder", encoder_only=True, space=settings, max_shard_size=20_000)
"""
    url = owner.run(code, space=str(space), checkpoint=str(checkpoint), secret=SECRET)
    repository, demo = hub.repository("org/encoder"), hub.repository("org/demo", "spaces")
    commit = repository.refs["refs/heads/main"]
    assert url == f"{hub.url}/org/encoder/commit/{commit}"
    files = repository.files()
    weights = {name for name in files if name.endswith(".safetensors")}
    assert ".eval_results/evaluation.yaml" not in files, "the results are of the whole model"
    assert len(weights) > 1 and "tokenizer.json" not in files and "distiller.safetensors" not in files
    for name in files:
        (tmp_path / "encoder").mkdir(exist_ok=True)
        (tmp_path / "encoder" / name).write_bytes(files[name])
    found = {key: value for name in weights for key, value in load_file(tmp_path / "encoder" / name).items()}
    expected = make_tower().state_dict()
    assert set(found) == set(expected) and all(torch.equal(found[key], expected[key]) for key in expected)
    assert load(str(tmp_path / "encoder"), meta=True)["device"] == "meta"
    assert set(demo.files()) == {".gitattributes", "README.md", "app.py", "examples/one.png"}
    assert demo.variables == {"MODEL_ID": "org/encoder", "MODEL_REVISION": commit, "THEME": "dark"}
    assert demo.secrets == {"PASSWORD": SECRET} and demo.hardware == "zero-a10g" and demo.sdk == "gradio"
    assert SECRET not in owner.log


@pytest.mark.slow
def test_a_dry_run_by_the_command_lists_all_and_sends_nothing(hub: Hub, checkpoint: Path, tmp_path: Path) -> None:
    before = sorted(path.name for path in checkpoint.parent.rglob("*"))
    requests = len(hub.requests)
    command = [sys.executable, Path(push_script.__file__), checkpoint, "org/nowhere", "--dry-run"]
    environment = hub.environment(tmp_path, OMP_NUM_THREADS="1")
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "  model.safetensors" in done.stdout and "nothing was sent" in done.stdout and "README.md" in done.stdout
    assert len(hub.requests) == requests
    assert sorted(path.name for path in checkpoint.parent.rglob("*")) == before


PUSHES = {
    "org/pushed": "model.push_to_hub(name)",
    "org/saved": "model.save_pretrained(folder + '/saved', push_to_hub=True, repo_id=name)",
}
PUSHER = """
from modeling_movekd import MoveKDForConditionalGeneration, vision_movekd
vision_movekd.SHARD_SIZE = 20_000
model = MoveKDForConditionalGeneration.from_pretrained(checkpoint)
"""
LOADER = """
import sys
sys.path[:] = [path for path in sys.path if path != root]
from transformers import AutoModel
result = type(AutoModel.from_pretrained(name, trust_remote_code=True)).__module__
"""


@pytest.mark.parametrize("name", PUSHES)
def test_pushed_by_transformers_it_has_its_code_and_our_shards(
    hub: Hub, checkpoint: Path, tmp_path: Path, name: str
) -> None:
    with client(hub, tmp_path, OWNER_TOKEN) as process:
        process.run(PUSHER + PUSHES[name], checkpoint=str(checkpoint), folder=str(tmp_path), name=name)
    files = hub.repository(name).files()
    assert set(files) >= CODE | {"model.safetensors.index.json"}
    with client(hub, tmp_path, OWNER_TOKEN) as process:
        module = process.run(LOADER, root=str(Path(__file__).parents[2]), name=name)
    assert module.startswith("transformers_modules.")
