"""Pushing: what leaves the machine, what is refused, and what the real client makes of a Hub that breaks."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path

import pytest
import torch
from exported import SIZE, make_model, make_tower, save_model
from hub_client import Client, ClientError, client
from hub_server import OWNER_TOKEN, READER_TOKEN, Hub, serve
from safetensors.torch import load as load_bytes
from safetensors.torch import load_file, save_file

from hub import push as push_script
from hub.publishable import CODE, checkpoint_files
from hub.validate import load
from modeling_movekd import __version__


SECRET = "SecretThatNobodyMaySee"
# Everything of a training run that has no business on the Hub
STAYS = [
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "training_args.bin",
    "trainer_state.json",
    ".env",
    "data.jsonl",
]
STAYS += ["language_lora.safetensors", "runs/events.out.tfevents", "checkpoint-3/optimizer.pt", "notes.txt"]
SPACE_CARD = "---\ntitle: Demo\nsdk: gradio\nsdk_version: 6.31.0\napp_file: app.py\n---\n"


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with serve() as hub:
        yield hub


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_model(make_model(make_tower()), tmp_path_factory.mktemp("run") / "checkpoint")
    (folder / "training_facts.json").write_text(json.dumps({"stage": "finetune", "steps": 7}))
    (folder / "evaluation.json").unlink()
    save_file({"clip.head": torch.ones(2)}, folder / "distiller.safetensors")
    for name in STAYS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"token={OWNER_TOKEN}")
    return folder


@pytest.fixture(scope="module")
def owner(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with client(hub, tmp_path_factory.mktemp("home"), OWNER_TOKEN, SPACE_PASSWORD=SECRET) as process:
        process.run("from pathlib import Path; from huggingface_hub import HfApi; import hub.push, hub.publish")
        yield process
        assert OWNER_TOKEN not in process.log and SECRET not in process.log


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint to spoil."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def push(owner: Client, *arguments: str | Path) -> str:
    owner.run("hub.push.main(arguments)", arguments=[str(argument) for argument in arguments])
    return owner.output


# --- What leaves the machine -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pushed(hub: Hub, owner: Client, checkpoint: Path) -> str:
    return push(owner, checkpoint, "org/model", "--private", "--tag")


def test_only_the_allow_list_is_published_in_one_commit(hub: Hub, pushed: str, checkpoint: Path) -> None:
    repository = hub.repository("org/model")
    files = repository.files()
    expected = {"model.safetensors", "distiller.safetensors", "config.json", "generation_config.json", "README.md"}
    expected |= {"processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert set(files) == expected | CODE | {"training_facts.json", ".gitattributes"}
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


STRANGER = f"""
import sys
sys.path[:] = [path for path in sys.path if path != root]
import torch
from transformers import AutoModel, AutoProcessor
model = AutoModel.from_pretrained("org/model", trust_remote_code=True, revision="v{__version__}")
processor = AutoProcessor.from_pretrained("org/model", trust_remote_code=True, revision="v{__version__}")
assert "modeling_movekd" not in sys.modules and type(model).__module__.startswith("transformers_modules.")
pixels = torch.linspace(-1, 1, 3 * {SIZE}**2).view(1, 3, {SIZE}, {SIZE})
result = [model.model.vision_tower(pixels).last_hidden_state.sum().item(), len(processor.tokenizer)]
"""


def test_a_stranger_loads_it_by_its_tag_online_and_off(hub: Hub, pushed: str, tmp_path: Path) -> None:
    root = str(Path(__file__).parents[2])
    tower = make_tower()
    pixels = torch.linspace(-1, 1, 3 * SIZE**2).view(1, 3, SIZE, SIZE)
    expected = tower(pixels).last_hidden_state.sum().item()
    with client(hub, tmp_path, OWNER_TOKEN) as process:
        online, _ = process.run(STRANGER, root=root)
    requests = len(hub.requests)
    with client(hub, tmp_path, HF_HUB_OFFLINE="1") as process:
        offline, _ = process.run(STRANGER, root=root)
    assert len(hub.requests) == requests
    assert online == offline == pytest.approx(expected, abs=1e-3)


@pytest.mark.slow
def test_nothing_is_sent_twice(hub: Hub, owner: Client, pushed: str, checkpoint: Path) -> None:
    uploads = dict(hub.uploads)
    push(owner, checkpoint, "org/model", "--private", "--tag")
    assert len(hub.repository("org/model").commits) == 2 and dict(hub.uploads) == uploads


@pytest.mark.slow
def test_the_authors_checkpoint_from_the_hub_and_ours_back(
    hub: Hub, owner: Client, authors: Path, converted: Path, tmp_path: Path
) -> None:
    vision = authors / json.loads((authors / "config.json").read_text())["mm_vision_tower"]
    hub.add_folder("org/clip", vision)
    hub.add_folder("authors/release", authors)
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
settings = hub.publish.SpaceSettings(Path(space), "org/demo", "zero-a10g", {"PASSWORD": secret}, {"THEME": "dark"})
result = hub.push.push(checkpoint, "org/encoder", encoder_only=True, space=settings, max_shard_size=20_000)
"""
    url = owner.run(code, space=str(space), checkpoint=str(checkpoint), secret=SECRET)
    repository, demo = hub.repository("org/encoder"), hub.repository("org/demo", "spaces")
    commit = repository.refs["refs/heads/main"]
    assert url == f"{hub.url}/org/encoder/commit/{commit}"
    files = repository.files()
    weights = {name for name in files if name.endswith(".safetensors")}
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


# --- A Hub that breaks -----------------------------------------------------------------------------------------------


@pytest.fixture
def staged(tmp_path: Path) -> Path:
    """What stands in for a checked checkpoint: a large file (three parts) and two small ones by LFS, and a text."""
    folder = tmp_path / "staged"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for name, size in (
        ("model-00001-of-00003", 11 * 2**20),
        ("model-00002-of-00003", 900),
        ("model-00003-of-00003", 800),
    ):
        (folder / f"{name}.safetensors").write_bytes(os.urandom(size))
    return folder


def publish(owner: Client, repo_id: str, stage: Path, token: str = OWNER_TOKEN, **arguments) -> list[str]:
    code = """
with hub.publish.explained(repo_id, token):
    api = HfApi(token=token)
    hub.publish.create_repository(api, repo_id, arguments.pop("private", None))
    commit = hub.publish.publish(api, repo_id, Path(stage), "Upload", **arguments)
    result = [commit.oid, commit.pr_url]
"""
    return owner.run(code, repo_id=repo_id, stage=str(stage), token=token, arguments=arguments)


def test_a_connection_that_is_cut_is_taken_up_again(hub: Hub, owner: Client, staged: Path) -> None:
    hub.cut_uploads, cuts = 1, hub.cuts
    publish(owner, "org/cut", staged)
    assert hub.cuts == cuts + 1
    large = (staged / "model-00001-of-00003.safetensors").read_bytes()
    assert hub.repository("org/cut").files()["model-00001-of-00003.safetensors"] == large


def test_what_arrived_before_a_break_is_not_sent_again(hub: Hub, owner: Client, staged: Path) -> None:
    hub.uploads_left, uploads = 1, hub.uploads.copy()
    try:
        with pytest.raises(ClientError, match="(?s)Request has expired.*Check that the token may write"):
            publish(owner, "org/broken", staged)
    finally:
        hub.uploads_left = None
    assert set(hub.repository("org/broken").files()) == {".gitattributes"}  # all or nothing
    arrived = hub.uploads - uploads
    publish(owner, "org/broken", staged)
    sent = hub.uploads - uploads
    assert len(sent) == 3 and set(sent.values()) == {1} and arrived.total() <= 1
    assert len(hub.repository("org/broken").files()) == 5


@pytest.mark.parametrize(
    ("token", "repo_id", "expected"),
    [
        ("hf_WrongTokenThatNobodyMaySee", "org/x", "hf auth login"),
        (READER_TOKEN, "org/x", "403.*rights to create"),
        (OWNER_TOKEN, "stranger/x", "403.*rights to create"),
    ],
)
def test_who_may_not_write_is_told_so(hub: Hub, owner: Client, staged: Path, token, repo_id, expected) -> None:
    with pytest.raises(ClientError, match=f"(?s){expected}") as error:
        publish(owner, repo_id, staged, token)
    assert token not in str(error.value) + owner.log


def test_a_full_storage_and_a_public_repository_are_errors(hub: Hub, owner: Client, staged: Path) -> None:
    hub.quota = 1000
    try:
        with pytest.raises(ClientError, match="(?s)storage limit reached.*storage that is left"):
            publish(owner, "org/full", staged)
    finally:
        hub.quota = None
    with pytest.raises(ClientError, match="org/full is public, and stays so"):
        publish(owner, "org/full", staged, private=True)
    assert set(hub.repository("org/full").files()) == {".gitattributes"}


def test_a_commit_in_the_meantime_is_a_conflict(hub: Hub, owner: Client, staged: Path) -> None:
    publish(owner, "org/busy", staged)
    (staged / "config.json").write_text('{"a": 1}')
    hub.commit_before = "org/busy"
    with pytest.raises(ClientError, match="(?s)412.*Somebody else has changed it"):
        publish(owner, "org/busy", staged)
    assert hub.repository("org/busy").files()["config.json"] == b"{}"


def test_what_arrives_damaged_is_an_error(hub: Hub, owner: Client, staged: Path) -> None:
    hub.damage = "config.json"
    try:
        with pytest.raises(ClientError, match="does not hold what was sent.*config.json has 9 bytes, not 2"):
            publish(owner, "org/damaged", staged)
    finally:
        hub.damage = None


def test_stale_shards_go_and_other_files_stay(hub: Hub, owner: Client, staged: Path) -> None:
    old = {
        "model.safetensors": b"old",
        "vocab.json": b"{}",
        "picture.png": b"p",
        "README.md": b"mine",
        "train.py": b"",
    }
    hub.add("org/old", old)
    publish(owner, "org/old", staged)
    files = set(hub.repository("org/old").files())
    assert files == {path.name for path in staged.iterdir()} | {"picture.png", "README.md", "train.py"}


def test_a_tag_does_not_move(hub: Hub, owner: Client, staged: Path) -> None:
    publish(owner, "org/tagged", staged, tag="v1")
    repository = hub.repository("org/tagged")
    publish(owner, "org/tagged", staged, tag="v1")  # nothing has changed
    assert len(repository.commits) == 2
    (staged / "model-00003-of-00003.safetensors").write_bytes(os.urandom(800))  # as large as the one before
    with pytest.raises(ClientError, match="has a tag v1 already, .* Give another name"):
        publish(owner, "org/tagged", staged, tag="v1")
    assert len(repository.commits) == 2


def test_branches_and_pull_requests(hub: Hub, owner: Client, staged: Path) -> None:
    oid, _ = publish(owner, "org/branches", staged, revision="best")
    repository = hub.repository("org/branches")
    assert repository.refs["refs/heads/best"] == oid and set(repository.files()) == {".gitattributes"}
    oid, url = publish(owner, "org/branches", staged, create_pr=True)
    assert url == f"{hub.url}/org/branches/discussions/1" and repository.refs["refs/pr/1"] == oid
    assert set(repository.files()) == {".gitattributes"} and len(repository.files("refs/pr/1")) == 5


# --- What is refused -------------------------------------------------------------------------------------------------


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
    (folder / "model.safetensors").unlink()


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
    stage, _ = push_script._stage(copy, tmp_path / "stage", None, 10**9)
    assert json.loads((stage / "config.json").read_text())["text_config"]["_name_or_path"] == "vicuna"


def test_the_tag_is_the_version_of_the_package() -> None:
    setup = ConfigParser(interpolation=None)
    setup.read(Path(__file__).parents[2] / "setup.cfg")
    assert setup["metadata"]["version"] == __version__


def test_pickles_beside_the_weights_stay(checkpoint: Path) -> None:
    chosen, left = checkpoint_files(checkpoint)
    assert {"optimizer.pt", "training_args.bin", "rng_state.pth"} <= set(left) and set(STAYS) <= set(left)
    assert not set(STAYS) & set(chosen)


def lose_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.vision_tower.pre_layrnorm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def spoil_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.vision_tower.pre_layrnorm.weight"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def add_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors") | {"model.another": torch.ones(1)}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lose_weight, "pre_layrnorm.weight"),
        (add_weight, "unexpected keys: .*model.another"),
        (spoil_weight, "not finite: .*pre_layrnorm.weight"),
        (
            lambda folder: edit(folder, "config.json", "image_token_index", value=3),
            "image token is 259, the model's 3",
        ),
        (lambda folder: (folder / "chat_template.jinja").unlink(), "no chat template"),
        (lambda folder: edit(folder, "config.json", "vision_config", "image_size", value=20), "20"),
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
