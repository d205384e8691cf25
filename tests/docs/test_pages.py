"""
The README and the pages of docs/: what they tell a reader to run works.

Each block of Bash or Python either runs here, in order, in a folder with a small checkpoint, or says on the line
before what it needs, as `<!-- needs: the Hub -->`. Lines of `accelerate launch` are only parsed, by the parsers of
accelerate and of `train/sft.py`, of `hf jobs run` by the Hub's client; of `pip install`, pytest and the developers'
tools only the names are checked.
"""

import ast
import configparser
import dataclasses
import importlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from huggingface_hub import JobHardware
from PIL import Image
from safetensors.torch import load_file
from trl import SFTConfig, TrlParser

from tests.helpers.colored_rows import llava_rows
from tests.helpers.running_space import ROOT, TOWERS, build_checkpoint
from train.arguments import DataArguments, ModelArguments
from train.config import PRESETS, MoveKDSFTConfig
from train.data.conversations import convert_row
from train.data.datasets import data_sources
from train.options import MethodOptions
from train.teachers.config import resolve_teacher


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NEEDS = {"the Hub", "a browser", "a few minutes", "vLLM", "llama.cpp", "Node and @huggingface/transformers"}
LANGUAGES = {"bash", "python", "json", "yaml", "js"}
# What stands on the pages for a reader's own, and what stands here for it
TOYS = {"CHECKPOINT": "outputs/demo", "CLIP": str(TOWERS / "clip"), "LANGUAGE_MODEL": str(TOWERS / "language_model")}
# Started by other tests (tests/spaces), as a page has nothing to check on the line itself
STARTED_ELSEWHERE = {"python spaces/app.py"}
ROOMS = ("modeling_movekd", "hub", "train")


@dataclass
class Block:
    page: Path
    line: int
    language: str
    text: str
    needs: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def serves(self) -> bool:
        """Whether the block starts the server or asks it."""
        return "modeling_movekd.serve " in self.text or "openai.OpenAI" in self.text


def blocks(page: Path) -> Iterator[Block]:
    lines = page.read_text(encoding="utf-8").splitlines()
    start = None
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if start is None:
            start = number
            continue
        mark = re.fullmatch(r"<!-- needs: (.*) -->", lines[start - 1])
        needs = None if mark is None else mark[1]
        yield Block(page, start + 1, lines[start][3:], "\n".join(lines[start + 1 : number]) + "\n", needs)
        start = None
    assert start is None, f"{page} has a block that does not end"


def commands(block: Block) -> list[str]:
    """The command lines of a block, those that are joined by `&&` apart."""
    text = block.text.replace("\\\n", " ")
    lines = [re.sub(r"\s+# .*|^#.*", "", line).strip() for line in text.splitlines()]
    return [command.strip() for line in lines if line for command in line.split(" && ")]


@pytest.fixture(scope="session")
def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


@pytest.fixture
def work(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with everything that the pages name."""
    shutil.copytree(checkpoint, tmp_path / "outputs" / "demo")
    generator = np.random.default_rng(0)
    for index in range(24):
        file = tmp_path / "photos" / ("dark", "light")[index % 2] / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 120, (64, 64, 3)) + 120 * (index % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(file)
    (tmp_path / "picture.png").write_bytes(file.read_bytes())
    rows = llava_rows(8)
    for index, row in enumerate(rows):
        row.pop("image").save(tmp_path / f"{index}.png")
        row["image"] = f"{index}.png"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    recipe = yaml.safe_load((ROOT / "train" / "recipes" / "demo_pretrain.yaml").read_text())
    recipe |= {"vision_model": TOYS["CLIP"], "language_model": TOYS["LANGUAGE_MODEL"], "use_cpu": True}
    recipe |= {"teachers": [{"name": "clip", "model": TOYS["CLIP"]}], "per_device_train_batch_size": 2}
    recipe |= {"dataset_name": "rows.json", "image_folder": ".", "max_steps": 2}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    build_checkpoint(folder)
    return folder


def in_clone(word: str) -> str:
    """A path of the clone as an absolute one."""
    is_path = word.split("/")[0] in ("train", "hub", "spaces", "tests", "benchmarks") and (ROOT / word).exists()
    return str(ROOT / word) if is_path else TOYS.get(word, word)


def check_launch(words: list[str]) -> None:
    """Parse the options of `accelerate launch` and of the run as the launcher and the script do."""
    launch = launch_command_parser().parse_args([in_clone(word) for word in words])
    assert launch.config_file is None or Path(launch.config_file).is_file()
    assert Path(launch.training_script) == ROOT / "train" / "sft.py"
    if launch.training_script_args:
        parser = TrlParser((DataArguments, MoveKDSFTConfig, ModelArguments))
        parser.parse_args_and_config([*launch.training_script_args, "--use_cpu", "true", "--bf16", "false"])


def check_job(words: list[str], setup: configparser.ConfigParser, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resolve a job as the Hub's client does, and check the commands that it runs."""
    JobHardware(words[words.index("--flavor") + 1])
    client = Path(sys.executable).with_name("hf")
    done = subprocess.run([client, "jobs", "run", "--dry-run", *words], capture_output=True, text=True, check=True)
    # The client takes options like -e for its own wherever they stand
    assert shlex.join(words[-3:]) in done.stdout and "Job not submitted" in done.stdout
    for command in re.split(r";\s+", words[-1]):
        if command.split()[0] in ("accelerate", "pip"):
            run_command(command.replace("install -q", "install"), setup, monkeypatch)


def check_pytest(words: list[str], setup: configparser.ConfigParser) -> None:
    marks = {line.split(":")[0] for line in setup["tool:pytest"]["markers"].split("\n")}
    rest = iter(words)
    for word in rest:
        if word == "-m":
            assert next(rest) in marks
        elif word == "--parity-dir":
            next(rest)
        else:
            assert (ROOT / word).exists(), word


def run_command(command: str, setup: configparser.ConfigParser, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs or checks one command, and fails for one that this function does not know."""
    said = ""
    if command.startswith("echo "):
        echo, target, rest = re.split(r" ([|>]) ", command, maxsplit=1)
        said = shlex.split(echo)[1] + "\n"
        if target == ">":
            Path(rest).write_text(said)
            return
        command = rest
    words = shlex.split(command)
    extras = setup["options.extras_require"]
    if command in STARTED_ELSEWHERE:
        assert (ROOT / words[1]).is_file()
    elif words[:3] == ["pip", "install", "-e"]:
        assert set(re.fullmatch(r"\.\[(.*)\]", words[3])[1].split(",")) <= set(extras)
    elif words[:2] == ["accelerate", "launch"]:
        check_launch(words[2:])
    elif words[:3] == ["hf", "jobs", "run"]:
        check_job(words[3:], setup, monkeypatch)
    elif words[:3] == ["python", "-m", "pytest"]:
        check_pytest(words[3:], setup)
    elif words == [".ci/run"]:
        assert os.access(ROOT / words[0], os.X_OK)
    elif (tool := words[2] if words[:2] == ["python", "-m"] else words[0]) in ("ruff", "mypy", "pre-commit", "build"):
        assert re.search(rf"^{tool} ", extras["dev"], re.MULTILINE)
    else:
        assert words[0] == "python", f"no test knows how to run: {command}"
        name = words[2] if words[1] == "-m" else words[1].removesuffix(".py").replace("/", ".")
        name += ".__main__" if (ROOT / name.replace(".", "/")).is_dir() else ""
        arguments = [in_clone(word) for word in words[3 if words[1] == "-m" else 2 :]]
        monkeypatch.setattr(sys, "stdin", io.StringIO(said))
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        assert not importlib.import_module(name).main(arguments)


def run_python(text: str, folder: Path) -> str:
    """A block of Python in a process of its own, which loads the checkpoint's code as a reader's does."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    command = [sys.executable, "-c", text]
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-6000:]
    return ran.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_runs_or_says_what_it_needs(
    page: Path, work: Path, setup: configparser.ConfigParser, monkeypatch: pytest.MonkeyPatch
) -> None:
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{block} is of the language {block.language!r}"
        if block.needs is not None:
            assert block.needs in NEEDS, f"{block} needs {block.needs!r}; write one of {NEEDS}"
        elif block.serves:
            continue  # test_the_server_answers_the_client
        elif block.language == "bash":
            for command in commands(block):
                try:
                    run_command(command, setup, monkeypatch)
                except (Exception, SystemExit) as error:
                    raise AssertionError(f"{block} has a command that does not work: {command}") from error
        elif block.language == "python":
            said = run_python(block.text, work)
            assert "print(" not in block.text or said.strip(), block


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer", "folder", "trained", "kept"),
    [
        ("DPOTrainer", "dpo", "language_model", None),
        ("GRPOTrainer", "grpo", "language_model", None),
        ("SFTTrainer", "merged", "q_proj", "vision_tower"),
    ],
)
def test_trl_and_peft_train_a_saved_student(
    work: Path, trainer: str, folder: str, trained: str, kept: str | None
) -> None:
    (block,) = (block for block in blocks(ROOT / "docs" / "trl.md") if f"{trainer}(" in block.text)
    # A random model never says the word: reward the answers' letters, which differ
    run_python(block.text.replace("word.lower() in text.lower()", "text.count('e')"), work)
    before = load_file(work / "outputs" / "demo" / "model.safetensors")
    after = load_file(work / "outputs" / folder / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert any(trained in name and "language_model" in name for name in changed)
    assert kept is None or not any(kept in name for name in changed)
    assert "loads" in run_python(
        "from transformers import AutoModelForImageTextToText, AutoProcessor\n"
        f"AutoModelForImageTextToText.from_pretrained('outputs/{folder}', trust_remote_code=True)\n"
        f"AutoProcessor.from_pretrained('outputs/{folder}', trust_remote_code=True)\nprint('loads')",
        work,
    )


@pytest.mark.slow
def test_the_server_answers_the_client(work: Path) -> None:
    found = [block for page in PAGES for block in blocks(page) if block.serves]
    (server,), (client,) = ([b for b in found if b.language == language] for language in ("bash", "python"))
    (command,) = commands(server)
    words = [*shlex.split(command)[1:-1], "0"]  # any free port
    process = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        address = next(found[0] for line in process.stdout if (found := re.search(r"http://127\.0\.0\.1:\d+", line)))
        assert run_python(client.text.replace("http://127.0.0.1:8000", address), work).strip()
    finally:
        process.terminate()
        process.communicate()


def test_data_and_options_in_json_and_yaml_are_read(work: Path) -> None:
    rows, keys = 0, set()
    for block in (block for page in PAGES for block in blocks(page)):
        if block.language == "json":
            row = convert_row(json.loads(block.text), 0, str(work))
            assert row["problem"] is None and len(row["images"]) == 1, f"{block}: {row['problem']}"
            rows += 1
        elif block.language == "yaml":
            options: dict[str, Any] = yaml.safe_load(block.text)
            keys |= options.keys()
            if "teachers" in options:
                assert [resolve_teacher(teacher).name for teacher in options["teachers"]] == [
                    "clip",
                    "convnext",
                    "mine",
                ]
            if "dataset_name" in options:
                fields = {field.name for field in dataclasses.fields(DataArguments)}
                assert set(options) <= fields and len(data_sources(DataArguments(**options))) == 2
    assert rows == 6 and {"teachers", "dataset_name"} <= keys


def table(page: str, heading: str) -> dict[str, list[str]]:
    """The first table under a heading, by the code in its first column."""
    text = (ROOT / page).read_text().split(f"\n{heading}\n", 1)[1]
    lines = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {row[0].strip("`"): row[1:] for row in cells}


def shown(value: Any) -> str:
    value = getattr(value, "value", value)
    return "-" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def test_the_table_of_options_is_complete() -> None:
    theirs = {field.name: field for field in dataclasses.fields(SFTConfig)}
    fields = [field for part in (DataArguments, MoveKDSFTConfig, ModelArguments) for field in dataclasses.fields(part)]
    ours = {field.name: field for field in fields if field.name not in theirs}
    options = table("docs/training.md", "## Options")
    assert options.keys() == ours.keys()
    for name, (default, meaning) in options.items():
        if name in PRESETS["paper"]:
            assert default == "[preset](method.md#presets)", name
        else:
            required = ours[name].default is dataclasses.MISSING
            assert default == ("required" if required else shown(ours[name].default)), name
        assert meaning.endswith("."), name
    changed = {field.name: field for field in fields if field.name in MethodOptions.__annotations__} - ours.keys()
    assert table("docs/training.md", "Defaults that differ from TRL's:").keys() == changed


def test_the_table_of_presets_is_the_code() -> None:
    presets = table("docs/method.md", "## Presets")
    assert presets == {option: [shown(of[option]) for of in PRESETS.values()] for option in PRESETS["paper"]}


def test_the_map_names_every_file() -> None:
    text = (ROOT / "docs" / "development.md").read_text()
    for room in ROOMS:
        part = text.split(f"**`{room}/`**", 1)[1].split("**`", 1)[0]
        named = set(re.findall(r"^\| `(\S+\.py)`", part, re.MULTILINE))
        paths = (path.relative_to(ROOT / room) for path in (ROOT / room).rglob("*.py"))
        # Packages that the map describes as a whole
        files = {str(path) for path in paths if path.parts[0] not in ("plan", "demo") and path.name != "__init__.py"}
        assert named == files, room


def messages(tree: ast.AST) -> Iterator[str]:
    """Every text in the code, with `...` for the values in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_the_errors_stand_in_the_code() -> None:
    code = "\n".join(
        message
        for room in ROOMS
        for path in sorted((ROOT / room).rglob("*.py"))
        for message in messages(ast.parse(path.read_text()))
    )
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    quoted = re.findall(r"^\| `` (.*?) `` \|", page, re.MULTILINE)
    assert len(quoted) >= 25
    missing = [text for text in quoted if text not in code]
    assert not missing, f"no message of the code says: {missing}"


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
            if target.startswith("https://"):
                continue
            file, _, anchor = target.partition("#")
            path = (page.parent / file).resolve() if file else page
            assert path.exists(), f"{page.name}: {target}"
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE) if anchor else []
            anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
            assert not anchor or anchor in anchors, f"{page.name}: {target}"


def test_the_readme_is_short_and_names_the_tests() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 130
    assert "\n## Tests\n\n```bash\npip install -e '.[train,demo,test]' && python -m pytest\n```\n" in text
