"""The Space's own functions, as modules: what the page hands them, and what they refuse."""

import ast
import asyncio
import importlib
import inspect
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from modeling_movekd import MoveKDForConditionalGeneration, MoveKDVisionModel
from modeling_movekd.images import decode_image
from modeling_movekd.processing import build_processor
from train.model_card import weights_fingerprint


gr = pytest.importorskip("gradio", reason="the Space needs gradio")
ROOT = Path(__file__).resolve().parents[2]
SPACE = ROOT / "spaces"
FIRST, SECOND = (SPACE / "examples" / f"scene_{number}.png" for number in (1, 2))
COUNT = "How many objects are there?"


@pytest.fixture(scope="module")
def modules() -> Iterator[dict[str, Any]]:
    """The Space's files as modules, which are top-level there."""
    names = [path.stem for path in SPACE.glob("*.py")]
    assert not set(names) & set(sys.modules)
    sys.path.insert(0, str(SPACE))
    try:
        yield {name: importlib.import_module(name) for name in ("visitors", "zero_gpu", *names)}
    finally:
        sys.path.remove(str(SPACE))
        os.environ.pop("GRADIO_TEMP_DIR")
        for name in names:
            sys.modules.pop(name, None)


@pytest.mark.slow
def test_a_client_that_stops_ends_the_generation(modules, checkpoint, monkeypatch):
    """Each token waits for leave: once a client has gone, leave for a few more is all that it takes."""
    from gradio_client import Client, handle_file

    student = modules["student"].load_student(str(checkpoint), None)
    demo = modules["app"].build(student, [], 1)
    for thread in threading.enumerate():
        if thread.name == "measure":
            thread.join()
    leave, made = threading.Semaphore(30), []
    hook = student.model.lm_head.register_forward_hook(lambda *_: made.append(leave.acquire(timeout=10)))
    demo.queue().launch(prevent_thread_lock=True, quiet=True, ssr_mode=False)
    try:
        job = Client(demo.local_url, verbose=False, httpx_kwargs={"timeout": 300}).submit(
            handle_file(FIRST), COUNT, 0, 1, 400, api_name="/ask"
        )
        assert next(iter(job))
        (thread,) = [thread for thread in threading.enumerate() if thread.name == "generate"]
        job.cancel()
        for _ in range(300):
            leave.release()
            thread.join(0.1)
            if not thread.is_alive():
                break
        assert not thread.is_alive() and len(made) < 340, len(made)
    finally:
        hook.remove()
        leave.release(400)
        demo.close()


def test_an_error_while_generating_reaches_the_visitor(modules, checkpoint, capsys):
    """As a sentence with nothing of what was said; the log has the place alone. Nobody waits for ever."""
    student = modules["student"].load_student(str(checkpoint), None)
    endpoints = modules["endpoints"].Endpoints(student, [], 1)

    def fail(*_: Any) -> None:
        raise RuntimeError("purple")

    student.model.lm_head.register_forward_hook(fail)
    with pytest.raises(gr.Error, match=r"Something failed here \(RuntimeError\)"):
        list(endpoints.ask(None, COUNT, 0, 1, 4))
    written = capsys.readouterr()
    assert "RuntimeError at" in written.err and "purple" not in written.err + written.out
    said = list(endpoints.page_turn({"text": COUNT, "files": []}, [], 0, 1, 4))
    assert [part.metadata["title"] for part in said] == ["Not answered"]
    assert endpoints.turns.acquire(blocking=False), "the turn was given back"


def test_errors_on_zero_gpu_come_back_as_sentences(modules, monkeypatch):
    """From the process that has the GPU only Gradio's own errors come back whole; it is not run here."""

    def stream(number: int) -> Iterator[int]:
        yield number
        raise ValueError("too long")

    zero_gpu = modules["zero_gpu"]
    assert zero_gpu.on_gpu(stream) is stream
    monkeypatch.setattr(zero_gpu, "ON_ZERO_GPU", True)
    monkeypatch.setattr(zero_gpu, "spaces", SimpleNamespace(GPU=lambda function: function))
    answers = zero_gpu.on_gpu(stream)(3)
    assert inspect.isgeneratorfunction(zero_gpu.on_gpu(stream)) and next(answers) == 3
    with pytest.raises(gr.Error) as raised:
        next(answers)
    assert pickle.loads(pickle.dumps(raised.value)).message == "too long" and not raised.value.print_exception
    with pytest.raises(gr.Error, match="ZeroDivisionError"):
        zero_gpu.on_gpu(lambda: 1 / 0)()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_and_other_data_types(modules, checkpoint, encoders, tmp_path, monkeypatch, dtype):
    """A model that cuts an image into tiles, in the data type of a GPU."""
    towers = ROOT / "train" / "demo" / "weights"
    language = AutoModelForCausalLM.from_pretrained(towers / "language_model", dtype=dtype)
    vision = MoveKDVisionModel.from_clip(towers / "clip", expert_init="kaiming")
    model = MoveKDForConditionalGeneration.from_parts(vision, language, image_aspect_ratio="anyres").eval()
    tokenizer = AutoTokenizer.from_pretrained(towers / "language_model")
    processor = build_processor(model.config, CLIPImageProcessor.from_pretrained(towers / "clip"), tokenizer)
    student = modules["student"].Student(str(tmp_path), None, model, processor, {})
    for name, value in encoders.items():
        monkeypatch.setenv(name, value)
    student.encoders, failures = modules["encoders"].load_encoders(student)
    endpoints = modules["endpoints"].Endpoints(student, failures, 1)
    image = tmp_path / "wide.png"
    Image.open(FIRST).convert("RGB").resize((120, 64)).save(image)
    assert not failures and list(endpoints.ask(str(image), COUNT, 0, 1, 8))[-1]
    pictures, shares = endpoints.pictures(str(image), 2)
    assert {picture.size for picture, _ in pictures} == {(448, 448)} and len(pictures) == 8
    assert sum(row["share"] for row in shares) == pytest.approx(1, abs=1e-3)
    page = endpoints.page_pictures(str(image), 2)
    assert page.count("<img") == 8 and page.count('alt="') == 8 and "Expert 3" in page and "Traceback" not in page
    assert 'role="alert"' in endpoints.page_pictures(str(SPACE / "app.py"), 2)


@pytest.mark.parametrize("name", ["expert_colors", "expert_colours"])
def test_code_of_older_checkpoints_names_the_colors_otherwise(modules, name):
    pictures = SimpleNamespace(expert_shares=torch.tensor([[0.25, 0.75]]))
    setattr(pictures, name, torch.tensor([[230, 159, 0], [86, 180, 233]], dtype=torch.uint8))
    rows = modules["drawing"].shares(pictures)
    assert [(row["color"], row["share"]) for row in rows] == [("#e69f00", 0.25), ("#56b4e9", 0.75)]


def test_history_of_the_page(modules):
    """Gradio notes a message in several forms; questions without an answer, and refusals, are not told the model."""
    history = [
        {"role": "user", "content": [{"type": "file", "file": {"path": str(FIRST)}}, {"type": "text", "text": "one"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "first"}]},
        {"role": "user", "content": [{"path": "gone.png"}, "never answered"]},
        {"role": "user", "content": "refused"},
        {"role": "assistant", "content": "No.", "metadata": {"title": "Not answered"}},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "second", "metadata": {"title": None}},
    ]
    messages = modules["uploads"].read_conversation(history, {"text": "three", "files": [str(SECOND)]})
    kinds = [[part["type"] for part in turn["content"]] for turn in messages]
    assert kinds == [["image", "text"], ["text"], ["text"], ["text"], ["image", "text"]]
    texts = [turn["content"][-1]["text"] for turn in messages]
    assert texts == ["one", "first", "two", "second", "three"]
    assert messages[0]["content"][0]["image"].tobytes() == Image.open(FIRST).convert("RGB").tobytes()
    with pytest.raises(ValueError, match="no longer kept here"):
        modules["uploads"].read_conversation(history[:2], {"text": "three", "files": ["gone.png"]})


def test_large_pictures_are_reduced_and_turned_upright(modules, tmp_path):
    picture = Image.new("RGB", (3000, 1500), "red")
    exif = picture.getexif()
    exif[274] = 6
    picture.save(tmp_path / "photo.jpg", exif=exif)
    assert modules["uploads"].decode(str(tmp_path / "photo.jpg")).size == (1024, 2048)


def test_files_above_the_bound_are_refused(modules, tmp_path):
    path = tmp_path / "large.png"
    path.write_bytes(FIRST.read_bytes().ljust(20 * 2**20 + 1))
    with pytest.raises(ValueError, match=r"The image has 20,971,521 bytes; at most 20,971,520 \(20 MB\) are taken"):
        modules["uploads"].decode(str(path))


@pytest.mark.parametrize("name", ["images.py", "prompts.py"])
def test_files_that_are_copies(name):
    """So that pixels are those of training, and prompts those of the commands."""
    assert (SPACE / name).read_bytes() == (ROOT / "modeling_movekd" / name).read_bytes()


def test_special_tokens_that_a_visitor_writes_stay_text(modules, checkpoint):
    student = modules["student"].load_student(str(checkpoint), None)
    tokenizer = student.processor.tokenizer
    written = f"<image> {tokenizer.eos_token} What?"
    parts = [{"type": "image", "image": Image.open(FIRST)}, {"type": "text", "text": written}]
    inputs = student.encode([{"role": "user", "content": parts}], 0)
    asked = student.encode([{"role": "user", "content": [*parts[:1], {"type": "text", "text": "What?"}]}], 0)
    special = [tokenizer.convert_tokens_to_ids("<image>"), tokenizer.eos_token_id]
    for token in special:
        assert (inputs["input_ids"] == token).sum() == (asked["input_ids"] == token).sum()
    assert inputs["pixel_values"].dtype == student.model.dtype
    alone = student.encode([{"role": "user", "content": [{"type": "text", "text": "<image>"}]}], 0)
    assert special[0] not in alone["input_ids"] and "pixel_values" not in alone


@pytest.mark.parametrize("ending", ["png", "tif"])
@pytest.mark.parametrize("mode", ["I;16", "I;16B", "LA", "P", "1", "RGBA"])
def test_pixels_are_those_of_training(modules, tmp_path, mode, ending):
    values = torch.arange(48 * 32).view(48, 32) * 40
    if mode.startswith("I;16"):
        order = ">u2" if mode.endswith("B") else "<u2"
        picture = Image.frombytes(mode, (32, 48), values.numpy().astype(order).tobytes())
    else:
        picture = Image.fromarray((values // 256).byte().numpy()).convert(mode)
    exif = Image.Exif()
    exif[274] = 6
    picture.save(path := tmp_path / f"deep.{ending}", exif=exif)
    decoded = decode_image(path)
    assert modules["uploads"].decode(str(path)).tobytes() == decoded.tobytes()
    if mode.startswith("I;16"):
        seen = torch.frombuffer(bytearray(decoded.tobytes()), dtype=torch.uint8).view(32, 48, 3)
        assert torch.equal(seen, torch.rot90(values // 256, -1)[..., None].expand(-1, -1, 3).byte())


@pytest.mark.parametrize(("mode", "ending"), [("I", "tif"), ("F", "tif"), ("I;16", "pgm")])
def test_values_without_a_known_range_are_refused(modules, tmp_path, mode, ending):
    """They would all be clipped to black or white, and that would be answered."""
    Image.new(mode, (8, 8), 1).save(path := tmp_path / f"deep.{ending}")
    with pytest.raises(ValueError, match="The image cannot be used: .* no known range: store it with 8 bits"):
        modules["uploads"].decode(str(path))


def test_decoding_ends_in_time(modules, monkeypatch):
    """All images of a conversation share the time."""
    monkeypatch.setattr(modules["uploads"], "DECODING_SECONDS", 0)
    with pytest.raises(ValueError, match="Image 1 of the conversation cannot be used: .* takes too long"):
        modules["uploads"].read_conversation([], {"text": COUNT, "files": [str(FIRST), str(SECOND)]})


def visit(limits: Any, path: str, *chunks: bytes, client: str = "1.2.3.4", method: str = "POST") -> tuple[int, int]:
    """Send a body, and return the status and how many bytes the application got."""
    messages = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    messages.append({"type": "http.request", "body": b"", "more_body": False})
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "path": path, "method": method, "headers": [], "client": (client, 1)}
    asyncio.run(limits(scope, receive, send))
    return sent[0]["status"], int(sent[1]["body"]) if sent[0]["status"] == 200 else 0


def test_bodies_are_bounded_before_they_are_read(modules, capsys):
    async def count(scope: dict[str, Any], receive: Any, send: Any) -> None:
        size, more = 0, True
        while more:
            message = await receive()
            size, more = size + len(message["body"]), message["more_body"]
        if scope["path"] == "/fails":
            raise KeyError("purple")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": str(size).encode()})

    module = modules["limits"]
    limits = module.BodyLimits(count)
    half = bytes(module.MAX_BODY // 2)
    assert visit(limits, "/queue/join", half, half) == (200, module.MAX_BODY)
    assert visit(limits, "/queue/join", half, half, b"1")[0] == 413
    assert visit(limits, "/queue/join", b"[" * 20_000) == (200, 20_000)
    assert visit(limits, "/queue/join", b"[{" * 10_000, b"[")[0] == 413
    assert visit(limits, "/config", method="GET") == (200, 0)
    assert visit(limits, "/fails", b"purple")[0] == 500
    written = capsys.readouterr()
    assert "KeyError at" in written.err and "purple" not in written.err + written.out
    # Uploads: of one request, of one visitor, of all, and again when the files are deleted
    whole = [bytes(2**20)] * (module.MAX_UPLOAD >> 20)
    assert visit(limits, "/upload", *whole, b"1", client="other")[0] == 413
    limits.sent.clear()
    assert [visit(limits, "/upload", *whole)[0] for _ in range(3)] == [200, 200, 413]
    assert visit(limits, "/mcp", b"1")[0] == 413 and visit(limits, "/upload", *whole, client="other")[0] == 200
    limits.sent[0].size = module.MAX_TOGETHER
    assert visit(limits, "/upload", b"1", client="third")[0] == 413
    for sent in limits.sent:
        sent.time -= 3601
    assert visit(limits, "/upload", b"1") == (200, 1)


def test_files_of_killed_processes_are_deleted_at_the_next_start(tmp_path):
    """And those of running ones are not."""
    code = "import visitors; (visitors.FOLDER / 'photo.png').touch(); print(visitors.FOLDER, flush=True); input()"
    environment = os.environ | {"PYTHONPATH": str(SPACE), "TMPDIR": str(tmp_path)}
    processes = []
    try:
        for killed in (False, True, False):
            command = [sys.executable, "-c", code]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            processes.append(subprocess.Popen(command, env=environment, **pipes))
            folder = Path(processes[-1].stdout.readline().strip())
            assert (folder / "photo.png").is_file()
            if killed:
                processes[-1].kill()
                processes[-1].wait()
                assert (gone := folder).is_dir()
        assert not gone.exists() and len(list(tmp_path.glob("movekd-*"))) == 2
        for process in (processes[0], processes[2]):
            process.communicate("\n")
        assert not list(tmp_path.iterdir())
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_old_files_are_deleted(modules, tmp_path):
    """All but the examples, whoever wrote them, and none before its time."""
    for name, age in {
        "upload/photo.png": 70,
        "pictures/image.png": 61,
        "examples/1.png": 70,
        "new/photo.png": 50,
    }.items():
        path = tmp_path / name
        path.parent.mkdir()
        path.write_bytes(FIRST.read_bytes() if "examples" in name else b"a visitor's")
        os.utime(path, (time.time() - 60 * age,) * 2)
    modules["uploads"].delete_old(tmp_path, {FIRST.read_bytes(), SECOND.read_bytes()})
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"examples/1.png", "new/photo.png"}


def test_checkpoints_that_are_of_no_use(modules, checkpoint, tmp_path, monkeypatch):
    load, find = modules["student"].load_student, modules["app"].find_student
    MoveKDVisionModel.from_clip(ROOT / "train" / "demo" / "weights" / "clip").save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match="'movekd_vision' checkpoint.* the vision encoder alone"):
        load(str(tmp_path / "encoder"), None)
    with pytest.raises(ValueError, match="'clip_vision_model' checkpoint; 'movekd'"):
        load(str(ROOT / "train" / "demo" / "weights" / "clip"), None)
    with pytest.raises(ValueError, match="MODEL_REVISION is not set"):
        load("owner/student", None)
    monkeypatch.delenv("MODEL_ID", raising=False)
    monkeypatch.setattr(modules["app"], "DEMO", tmp_path / "demo")
    with pytest.raises(ValueError, match="train/sft.py"):
        find()
    monkeypatch.setenv("CONCURRENCY", "0")
    with pytest.raises(ValueError, match="CONCURRENCY is '0'"):
        modules["app"].whole_number("CONCURRENCY", 1)


def test_encoders_beside_the_student(modules, checkpoint, monkeypatch, tmp_path):
    """By default those that its metadata names. An encoder that cannot be loaded is reported, the rest is shown."""
    student = modules["student"].load_student(str(checkpoint), None)
    wanted = modules["encoders"].wanted
    monkeypatch.delenv("CLIP_ID", raising=False)
    monkeypatch.delenv("TEACHER_IDS", raising=False)
    assert wanted(student) == []
    student.metadata = {"teachers": [{"name": name, "model": name} for name in ("clip", "detector", "gone")]}
    towers = ROOT / "train" / "demo" / "weights"
    assert wanted(student) == [
        ("plain CLIP", str(towers / "clip"), None, True),
        ("detector", str(towers / "detector"), None, False),
    ]
    student.metadata["base_models"] = [{"role": "vision_model", "model": "openai/clip", "revision": "abc"}]
    assert wanted(student)[0] == ("plain CLIP", "openai/clip", "abc", True)
    monkeypatch.setenv("CLIP_ID", "none")
    monkeypatch.setenv("TEACHER_IDS", f"one={towers / 'detector'}, facebook/two@v1, three={tmp_path}")
    assert wanted(student)[1] == ("two", "facebook/two", "v1", False)
    monkeypatch.setenv("TEACHER_IDS", f"one={towers / 'detector'}, three={tmp_path}")
    loaded, failures = modules["encoders"].load_encoders(student)
    assert [encoder.name for encoder in loaded] == ["one"] and len(failures) == 1 and "three" in failures[0]
    features = loaded[0].features(Image.open(FIRST).convert("RGB"), 0)
    assert features.shape == (1, 64, 96), "96 pixels a side in patches of 12, without [CLS]"


def test_plain_clip_is_the_one_that_the_student_started_from(modules, checkpoint, monkeypatch):
    """Known by its weights, since the metadata of a student of folders has their names alone."""
    monkeypatch.delenv("CLIP_ID", raising=False)
    monkeypatch.delenv("TEACHER_IDS", raising=False)
    student = modules["student"].load_student(str(checkpoint), None)
    load = modules["encoders"].load_encoders
    towers = ROOT / "train" / "demo" / "weights"
    origin = {"role": "vision_model", "model": "clip", "revision": None}
    teachers = [{"name": name, "model": name} for name in ("clip", "reader")]
    own = {"vision_model": "clip", "base_models": [origin], "teachers": teachers}
    own["vision_fingerprint"] = weights_fingerprint(str(towers / "clip"))
    student.metadata = own
    encoders, failures = load(student)
    assert [encoder.name for encoder in encoders] == ["plain CLIP", "reader"] and not failures
    other = CLIPVisionModel(CLIPVisionConfig.from_pretrained(towers / "clip"))
    for fingerprint in (modules["encoders"].weights_fingerprint(other), None):
        student.metadata = own | {"vision_fingerprint": fingerprint}
        encoders, failures = load(student)
        assert not encoders and len(failures) == 2
        assert failures[0] == (
            "plain CLIP is not shown: the weights in clip are not known to be those that the student was made with. "
            "Name the right ones by CLIP_ID."
        )
    monkeypatch.setenv("CLIP_ID", str(towers / "clip"))
    assert [encoder.name for encoder in load(student)[0]] == ["plain CLIP", "reader"], "the metadata does not tell"
    student.metadata = own | {"vision_fingerprint": modules["encoders"].weights_fingerprint(other)}
    assert not load(student)[0]
    monkeypatch.delenv("CLIP_ID")
    student.metadata = own | {"vision_model": "my_clip", "teachers": []}
    assert load(student) == ([], ["plain CLIP is not shown: there is no my_clip here. Name it by CLIP_ID."])
    # The dtype in which it is stored does not matter
    assert modules["encoders"].weights_fingerprint(other.half()) == modules["encoders"].weights_fingerprint(
        other.float()
    )


@pytest.mark.parametrize("pads", [True, False])
@pytest.mark.parametrize("size", [(128, 64), (64, 192), (64, 64)])
def test_other_encoders_get_what_the_student_sees(modules, checkpoint, size, pads):
    """Of a checkpoint that pads, and of one that was converted from a model that cuts its images to squares."""
    student = modules["student"].load_student(str(checkpoint), None)
    images = student.processor.image_processor
    images.do_pad, images.do_center_crop = pads, not pads  # as `hub/convert.py` leaves them
    clip = modules["encoders"].Encoder("clip", str(ROOT / "train" / "demo" / "weights" / "clip"), None, student, True)
    picture = Image.open(FIRST).convert("RGB").resize(size)
    torch.testing.assert_close(clip.pixels(picture), images(picture, return_tensors="pt")["pixel_values"])


def test_the_folder_is_a_space():
    text = (SPACE / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["sdk"] == "gradio" and (SPACE / front["app_file"]).is_file()
    assert len(front["short_description"]) <= 60 and not (SPACE / "__init__.py").exists()
    assert sum(path.stat().st_size for path in SPACE.rglob("*.png")) < 50_000
    rooms = {"modeling_movekd", "train", "hub", "benchmarks", "tests"}
    for path in SPACE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & rooms, path
