"""What a stranger has: the saved folder, torch and transformers, no network, and nothing of this repository."""

import ast
import json
import os
import shutil
import subprocess
import sys
import textwrap
import venv
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, CLIPImageProcessor

import modeling_movekd


PACKAGE = Path(modeling_movekd.__file__).parent
COPIED = sorted(PACKAGE.glob("*_movekd.py"))
MODEL_CODE = {
    "base_encoders_movekd.py",
    "configuration_movekd.py",
    "experts_movekd.py",
    "modeling_movekd.py",
    "vision_movekd.py",
    "visualization_movekd.py",
}
WHOLE = ("pad", "anyres", "tied", "siglip")
QUESTION = "What is this?"

# Run by an isolated interpreter (no PYTHONPATH, no current folder); an editable install of this repository, which puts
# it on the path of every process, is taken off again.
STRANGER = textwrap.dedent(
    """
    import importlib.util, json, socket, sys
    from pathlib import Path

    def owns(entry):
        return "site-packages" not in entry and (Path(entry) / "modeling_movekd").is_dir()

    sys.path[:] = [entry for entry in sys.path if not owns(entry)]
    sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
    for name in ("modeling_movekd", "train", "hub"):
        assert importlib.util.find_spec(name) is None, f"{name} is importable: {importlib.util.find_spec(name)}"

    def refuse(*args, **kwargs):
        raise AssertionError(f"a connection was tried: {args}")

    socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse

    import torch
    from PIL import Image
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor
    from transformers import pipeline
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    folders, image, pixels = json.loads(sys.argv[1]), Image.open(sys.argv[2]), load_file(sys.argv[3])["pixels"]
    trust = {"trust_remote_code": True}
    question = [{"type": "image", "image": image}, {"type": "text", "text": "What is this?"}]
    report = {}
    for kind, folder in folders.items():
        config, model = AutoConfig.from_pretrained(folder, **trust), AutoModel.from_pretrained(folder, **trust)
        found = report[kind] = {"config": type(config).__name__, "model": type(model).__name__}
        found["module"] = type(model).__module__
        if kind == "encoder":
            processor = AutoImageProcessor.from_pretrained(folder)
            with torch.no_grad():
                output = model(pixels, output_router_probabilities=True)
            found |= {"size": processor(image, return_tensors="pt")["pixel_values"].shape[-1]}
            save_file({"output": output.last_hidden_state, "router": output.router_probabilities[0]}, folder + ".out")
        else:
            other = AutoModelForImageTextToText.from_pretrained(folder, **trust)
            processor = AutoProcessor.from_pretrained(folder)
            pipe = pipeline("image-text-to-text", model=folder, **trust)
            inputs = processor.apply_chat_template(
                [{"role": "user", "content": question}],
                add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
            )
            with torch.no_grad():
                outputs = {"auto_model": model(**inputs).logits, "auto_generation": other(**inputs).logits}
            save_file(outputs, folder + ".out")
            answer = other.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            settings = {"return_full_text": False, "generate_kwargs": {"max_new_tokens": 6, "do_sample": False}}
            piped = pipe(text=[{"role": "user", "content": question}], **settings)
            two = [{"type": "image", "image": image.rotate(90, expand=True)}, *question]
            chats = [[{"role": "user", "content": content}] for content in (question, two, question[1:])]
            alone = [pipe(text=chat, **settings)[0]["generated_text"] for chat in chats]
            batches = {
                "list": pipe(text=chats, **settings), "batch": pipe(text=chats[:2], batch_size=2, **settings),
            }
            found |= {
                "generation": type(other).__name__, "processor": type(processor).__name__,
                "pipeline": type(pipe.model).__name__, "answer": processor.decode(answer, skip_special_tokens=True),
                "piped": piped[0]["generated_text"], "alone": alone,
                "batches": {name: [one["generated_text"] for (one,) in batch] for name, batch in batches.items()},
                "max_new_tokens": other.generation_config.max_new_tokens,
            }
            processor.save_pretrained(folder + "_again")
            # What vLLM and SGLang do before they build the model
            for engine in ("vllm", "sglang"):
                ALL_ATTENTION_FUNCTIONS[engine] = ALL_ATTENTION_FUNCTIONS["sdpa"]
                config.text_config._attn_implementation = engine
                with torch.device("meta"):
                    base = AutoModel.from_config(config, **trust)
                found[engine] = [type(base).__name__, sorted(base.state_dict())]
        model.save_pretrained(folder + "_again")
        model.save_pretrained(folder + "_again")
    ours = [name for name in sys.modules if name.split(".")[0] in ("modeling_movekd", "train", "hub")]
    assert not ours, ours
    print("REPORT" + json.dumps(report))
    """
)


def visit(
    folders: dict[str, Path], image: Path, pixels: Path, work: Path, python: str | Path = sys.executable
) -> dict[str, dict]:
    """Load the folders as a stranger would, from `work`, with a cache of its own."""
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "LANG", "LD_LIBRARY_PATH")}
    result = subprocess.run(
        [python, "-I", "-c", STRANGER, json.dumps({k: str(v) for k, v in folders.items()}), image, pixels],
        cwd=work,
        env=kept | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(work / "cache"), "OMP_NUM_THREADS": "1", "HOME": str(work)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-6000:]
    return json.loads(result.stdout.split("REPORT")[1])


@pytest.fixture(scope="module")
def published(make_model, make_tower, make_processor, make_image, tmp_path_factory):
    """Folders as they are published, the models they hold, and what to show them."""
    root = tmp_path_factory.mktemp("published")
    models = {
        "pad": make_model(),
        "anyres": make_model("qwen3", image_aspect_ratio="anyres"),
        "tied": make_model("smollm", tower={"num_experts": 0}),
        "siglip": make_model("qwen3", tower={"base": "siglip"}),
        "encoder": make_tower(balance_bias=True),
    }
    for layer in models["encoder"].encoder.layers:
        layer.mlp.router.balance_bias.copy_(torch.tensor([0.3, -0.3, 0.0]))
    for kind, model in models.items():
        if kind == "encoder":
            CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16).save_pretrained(root / kind)
        else:
            model.generation_config.max_new_tokens = 9
            make_processor(model).save_pretrained(root / kind)
        model.save_pretrained(root / kind)
    make_image(40, 24).save(root / "image.png")
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    save_file({"pixels": pixels}, root / "pixels.safetensors")
    return root, models


@pytest.fixture(scope="module")
def report(published, tmp_path_factory) -> dict[str, dict]:
    root, models = published
    folders = {kind: root / kind for kind in models}
    return visit(folders, root / "image.png", root / "pixels.safetensors", tmp_path_factory.mktemp("elsewhere"))


def test_types(report):
    assert (
        report["encoder"].items() >= {"config": "MoveKDVisionConfig", "model": "MoveKDVisionModel", "size": 16}.items()
    )
    for kind in WHOLE:
        found = report[kind]
        assert found["config"] == "MoveKDConfig" and found["max_new_tokens"] == 9
        assert {found[name] for name in ("model", "generation", "pipeline")} == {"MoveKDForConditionalGeneration"}
        assert found["processor"] == ("LlavaNextProcessor" if kind == "anyres" else "LlavaProcessor")
    assert all(found["module"].startswith("transformers_modules.") for found in report.values())


@pytest.mark.parametrize("kind", WHOLE)
def test_engines_build_the_model_without_its_head(published, report, kind):
    names = [f"model.{name}" for name in published[1][kind].model.state_dict()]
    for engine in ("vllm", "sglang"):
        name, found = report[kind][engine]
        assert name == "MoveKDModel" and [f"model.{key}" for key in found] == sorted(names)


@torch.no_grad()
def check_logits_and_answer(root, models, report, make_image, kind):
    model, processor = models[kind], AutoProcessor.from_pretrained(root / kind)
    content = [{"type": "image", "image": make_image(40, 24)}, {"type": "text", "text": QUESTION}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    outputs = load_file(f"{root / kind}.out")
    for name in ("auto_model", "auto_generation"):
        torch.testing.assert_close(outputs[name], model(**inputs).logits, atol=1e-5, rtol=1e-5)
    answer = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    answer = processor.decode(answer, skip_special_tokens=True)
    assert answer and report[kind]["answer"] == report[kind]["piped"] == answer


@pytest.mark.parametrize("kind", WHOLE)
def test_a_pipeline_answers_chats_of_several_images_in_batches(report, kind):
    """As one by one: padding changes nothing."""
    alone, batches = report[kind]["alone"], report[kind]["batches"]
    assert alone[0] == report[kind]["piped"] and len(set(alone)) == 3 and all(alone)
    assert batches == {"list": alone, "batch": alone[:2]}


@torch.no_grad()
def check_features(root, models):
    pixels, outputs = load_file(root / "pixels.safetensors")["pixels"], load_file(f"{root / 'encoder'}.out")
    expected = models["encoder"](pixels, output_router_probabilities=True)
    torch.testing.assert_close(outputs["output"], expected.last_hidden_state, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs["router"], expected.router_probabilities[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", WHOLE)
def test_same_logits_and_same_answer(published, report, make_image, kind):
    check_logits_and_answer(*published, report, make_image, kind)


def test_same_features(published, report):
    check_features(*published)


@pytest.mark.slow
@pytest.mark.parametrize("requirement", ["transformers==5.16.1", "transformers"])
def test_the_oldest_and_the_newest_transformers_give_the_same(published, make_image, tmp_path, requirement):
    """In an environment of its own, which takes torch and all else from the one that runs the tests."""
    root, models = tmp_path / "published", published[1]
    shutil.copytree(published[0], root)
    venv.create(tmp_path / "venv", with_pip=True)
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (packages / "outer.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--upgrade", requirement], check=True)
    report = visit(
        {kind: root / kind for kind in models}, root / "image.png", root / "pixels.safetensors", tmp_path, python
    )
    for kind in WHOLE:
        check_logits_and_answer(root, models, report, make_image, kind)
    check_features(root, models)


def test_saved_again_by_the_stranger(published, report, tmp_path):
    """Saving a model that came by remote code, twice, keeps weights, code and auto classes as they were."""
    root, models = published
    for kind in models:
        first, again = root / kind, Path(f"{root / kind}_again")
        code = {path.name for path in first.glob("*.py")}
        assert code == MODEL_CODE - ({"modeling_movekd.py"} if kind == "encoder" else set())
        assert {path.name for path in again.glob("*.py")} == code
        for name in code:
            assert (again / name).read_text() == (first / name).read_text() == (PACKAGE / name).read_text()
        configs = [json.loads((folder / "config.json").read_text()) for folder in (first, again)]
        assert configs[0]["auto_map"] == configs[1]["auto_map"]
        assert all("--" not in target for target in configs[1]["auto_map"].values()), "points back to another folder"
        assert configs[0] == configs[1]
        before, after = (load_file(folder / "model.safetensors") for folder in (first, again))
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    # And it loads from there alone, once the first folder is gone
    moved = tmp_path / "moved"
    shutil.copytree(f"{root / 'pad'}_again", moved)
    found = visit({"pad": moved}, root / "image.png", root / "pixels.safetensors", tmp_path)["pad"]
    assert found["answer"] == report["pad"]["answer"] and found["generation"] == "MoveKDForConditionalGeneration"


# --- The copied files themselves -----------------------------------------------------------------------------------


def test_copied_files_are_the_models_and_what_they_import():
    assert {path.name for path in COPIED} >= MODEL_CODE


@pytest.mark.parametrize("path", COPIED, ids=lambda path: path.name)
def test_copied_files_import_torch_and_transformers_only(path):
    """`huggingface_hub` is a requirement of transformers. Relative imports are followed only as `from .x import y`."""
    allowed = {"torch", "transformers", "huggingface_hub"} | sys.stdlib_module_names
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = {alias.name.split(".")[0] for alias in node.names}
            assert names <= allowed, (path.name, node.lineno, names - allowed)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module.split(".")[0] in allowed, (path.name, node.lineno, node.module)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1 and node.module and node in tree.body, (path.name, node.lineno)
            assert node.module.endswith("_movekd") and (path.parent / f"{node.module}.py").exists()


@pytest.mark.parametrize("path", COPIED, ids=lambda path: path.name)
def test_copied_files_open_no_file_process_or_connection(path):
    forbidden_modules = {
        "subprocess",
        "socket",
        "urllib",
        "http",
        "shutil",
        "pickle",
        "ctypes",
        "importlib",
        "requests",
    }
    forbidden_calls = {"open", "exec", "eval", "compile", "__import__"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not {name.split(".")[0] for name in names} & forbidden_modules, (path.name, node.lineno)
        if isinstance(node, ast.Name):
            assert node.id not in forbidden_calls, (path.name, node.lineno, node.id)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            assert node.attr in ("PathLike", "path"), (path.name, node.lineno, node.attr)
