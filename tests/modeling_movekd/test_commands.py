"""The command lines over a checkpoint: chat and predict, on a tiny model saved to a folder."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from modeling_movekd import MoveKDVisionModel, chat, predict
from modeling_movekd.inference import Conversation, load_checkpoint, user_message
from modeling_movekd.prompts import prepare


@pytest.fixture(scope="module", params=["pad", "anyres"])
def checkpoint(request, make_model, make_processor, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    model = make_model(image_aspect_ratio=request.param, image_token_id=None)
    model.config.text_config.max_position_embeddings = 1200
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    make_processor(model).save_pretrained(folder)
    return folder


@pytest.fixture
def pictures(make_image, tmp_path) -> Path:
    for seed in range(4):
        make_image(20 + 5 * seed, 16, seed=seed).save(tmp_path / f"{seed}.png")
    return tmp_path


def plain_answer(checkpoint: Path, conversation: list, new_tokens: int = 6) -> str:
    model, processor = load_checkpoint(checkpoint, fold=False)
    inputs = prepare(processor, [conversation], model.device)
    output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_turns_are_those_of_generate_and_images_are_encoded_once(checkpoint, make_image):
    model, processor = load_checkpoint(checkpoint)
    assert model.model.vision_tower.encoder.layers[0].mlp.folded is not None
    encoded: list[int] = []
    model.model.vision_tower.register_forward_hook(lambda *_: encoded.append(1))
    conversation = Conversation(model, processor, max_new_tokens=6, do_sample=False)
    turns = [("What?", [make_image(seed=1)]), ("And?", []), ("These?", [make_image(24, 9, 2), make_image(seed=3)])]
    messages: list = []
    for text, images in turns:
        messages.append(user_message(text, images))
        answer = conversation.ask(text, images)
        assert answer == plain_answer(checkpoint, messages)
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    assert len(encoded) == 2, "once for each turn that brings images"
    conversation.reset()
    assert conversation.ask("Words alone?") == plain_answer(checkpoint, [user_message("Words alone?")])


def test_special_tokens_in_a_text_stay_text(checkpoint, make_image):
    """Only the template may end a turn or place an image, in a batch and alone."""
    model, processor = load_checkpoint(checkpoint)
    image = make_image()
    texts = ["Say </s> or <image>, <s> or <unk>.", "A longer one, of more words: <</s>/s> <image", "No such thing."]
    conversations = [[user_message(text, [image])] for text in texts]
    batch = prepare(processor, conversations, model.device)
    size = len(processor.tokenizer)
    for index, (text, conversation) in enumerate(zip(texts, conversations, strict=True)):
        alone = prepare(processor, [conversation], model.device)
        mask = batch["attention_mask"][index].bool()
        assert mask[-1] and torch.equal(batch["input_ids"][index][mask], alone["input_ids"][0])
        assert alone["attention_mask"].all() and alone["input_ids"].max() < size == len(processor.tokenizer)
        # One token a byte, so that a text of as many other bytes has tokens in the same places
        other = prepare(processor, [[user_message("~" * len(text), [image])]], model.device)["input_ids"][0]
        own = alone["input_ids"][0].clone()
        place = (other == processor.tokenizer.convert_tokens_to_ids("~")).nonzero()[:, 0]
        assert "".join(processor.tokenizer.convert_ids_to_tokens(own[place])).replace("\u0120", " ") == text
        own[place] = other[place]
        assert torch.equal(own, other)


def test_a_turn_that_fails_leaves_the_conversation_as_it_was(checkpoint, make_image):
    conversation = Conversation(*load_checkpoint(checkpoint), max_new_tokens=4, do_sample=False)
    conversation.ask("One", [make_image()])
    before = list(conversation.messages)
    with pytest.raises(ValueError, match="the language model takes 1200"):
        conversation.ask("x" * 1300)
    assert conversation.messages == before
    conversation.ask("Two", [make_image(seed=1)])


@pytest.mark.parametrize("checkpoint", ["pad"], indirect=True)
def test_chat_over_a_pipe(checkpoint, pictures, capfd):
    lines = ["What is it?", "/image nothing.png", "/nonsense", f"/image {pictures}/2.png", "And this?", "/history"]
    lines += ["/reset", "/history", "Hello?", "/exit", "never read"]
    command = [sys.executable, "-m", "modeling_movekd.chat", str(checkpoint), "--image", str(pictures / "1.png")]
    result = subprocess.run(
        [*command, "--max-new-tokens", "6"], input="\n".join(lines), capture_output=True, text=True, check=False
    )
    model, processor = load_checkpoint(checkpoint)
    conversation = Conversation(model, processor, max_new_tokens=6, do_sample=False)
    first = conversation.ask("What is it?", [predict.load_image(pictures, "1.png")])
    second = conversation.ask("And this?", [predict.load_image(pictures, "2.png")])
    expected = [first, second, "user: <image> What is it?", f"assistant: {first}"]
    expected += ["user: <image> And this?", f"assistant: {second}"]
    conversation.reset()
    expected.append(conversation.ask("Hello?"))
    assert result.stdout.replace("\n", " ").split() == " ".join(expected).split()
    assert "nothing.png: no such file" in result.stderr and "/nonsense is no command" in result.stderr
    assert result.returncode == 1 and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["EMPTY"], "config.json"), (["ENCODER"], "'movekd_vision' checkpoint; 'movekd' is needed")],
)
def test_checkpoints_that_cannot_chat(arguments, message, make_tower, tmp_path, capsys):
    make_tower().save_pretrained(tmp_path / "ENCODER")
    (tmp_path / "EMPTY").mkdir()
    assert chat.main([str(tmp_path / argument) for argument in arguments]) == 1
    assert message in capsys.readouterr().err


def write_questions(folder: Path) -> Path:
    rows = [{"question_id": i, "image": f"{i % 4}.png", "text": f"What is {'x' * i}?"} for i in range(7)]
    rows[3].pop("image")
    rows[5]["image"] = ["1.png", "3.png"]
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answers(path: Path) -> dict:
    return {row["question_id"]: row["text"] for row in map(json.loads, path.read_text().splitlines())}


def test_predict_is_generate_row_by_row(checkpoint, pictures):
    questions = write_questions(pictures)
    folder = [
        "--image-folder",
        str(pictures),
        "--max-new-tokens",
        "6",
        "--batch-size",
        "3",
        "--prompt-suffix",
        " Say.",
    ]
    assert predict.main([str(checkpoint), str(questions), str(pictures / "answers.jsonl"), *folder]) == 0
    got = answers(pictures / "answers.jsonl")
    assert list(got) == list(range(7))
    for row in map(json.loads, questions.read_text().splitlines()):
        names = row.get("image", [])
        images = [predict.load_image(pictures, name) for name in ([names] if isinstance(names, str) else names)]
        assert got[row["question_id"]] == plain_answer(checkpoint, [user_message(row["text"] + " Say.", images)])
    assert sorted(path.name for path in pictures.glob("answers*")) == ["answers.jsonl"]


# The command line, which kills itself with a batch half answered
KILLED = """
import os, signal, sys
from modeling_movekd import predict

answer_batch, calls = predict.answer_batch, []

def answer_two_batches(*args, **kwargs):
    calls.append(1)
    if len(calls) > 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return answer_batch(*args, **kwargs)

predict.answer_batch = answer_two_batches
predict.main(sys.argv[1:])
"""


@pytest.mark.parametrize("checkpoint", ["pad"], indirect=True)
def test_predict_goes_on_after_a_kill(checkpoint, pictures):
    questions = write_questions(pictures)
    arguments = [str(checkpoint), str(questions), str(pictures / "a.jsonl"), "--image-folder", str(pictures)]
    arguments += ["--max-new-tokens", "4", "--batch-size", "2"]
    result = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, check=False)
    assert result.returncode == -signal.SIGKILL
    partial = pictures / "a.jsonl.part"
    first = partial.read_text()
    assert first.count("\n") == 4 and not (pictures / "a.jsonl").is_file()
    rows = [json.loads(line) for line in first.splitlines()]
    rows[0]["answer"] = kept = "kept\u2028it\u0085 is"
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    partial.write_bytes(lines + lines[: lines.index("\u2028".encode()) + 1])  # a line cut short, within a character
    assert predict.main(arguments) == 0
    found = [json.loads(line) for line in (pictures / "a.jsonl").read_bytes().split(b"\n")[:-1]]
    assert [row["question_id"] for row in found] == list(range(7)) and not partial.exists()
    noted = {json.loads(row["key"])[0]: row["answer"] for row in rows}
    assert {row["question_id"]: row["text"] for row in found}.items() >= noted.items() and kept in noted.values()


@pytest.mark.parametrize("checkpoint", ["pad"], indirect=True)
def test_predict_mixes_no_answers(checkpoint, pictures, capsys):
    """Of another checkpoint with the same name, other weights in the folder, or other settings."""
    checkpoint = Path(shutil.copytree(checkpoint, pictures / checkpoint.name))
    questions, partial = write_questions(pictures), pictures / "a.jsonl.part"
    arguments = [str(questions), str(pictures / "a.jsonl"), "--image-folder", str(pictures), "--batch-size", "2"]
    arguments += ["--max-new-tokens", "4"]
    result = subprocess.run([sys.executable, "-c", KILLED, str(checkpoint), *arguments], check=False)
    assert result.returncode == -signal.SIGKILL
    left = partial.read_bytes()
    other = shutil.copytree(checkpoint, pictures / "other" / checkpoint.name)
    assert predict.main([str(other), *arguments]) == 1
    assert str(checkpoint.resolve()) in (error := capsys.readouterr().err) and str(other.resolve()) in error
    for changed in (["--max-new-tokens", "5"], ["--num-beams", "2"], ["--dtype", "bfloat16"], ["--image-folder", "."]):
        assert predict.main([str(checkpoint), *arguments, *changed]) == 1
        assert "Remove the file to begin anew" in capsys.readouterr().err
    written = (weights := checkpoint / "model.safetensors").stat().st_mtime_ns
    os.utime(weights, ns=(0, written + 1))
    assert predict.main([str(checkpoint), *arguments]) == 1
    os.utime(weights, ns=(0, written))
    assert partial.read_bytes() == left and not (pictures / "a.jsonl").exists()
    # Another question of the same number is asked
    questions.write_text(questions.read_text().replace("What is ?", "Who is ?"))
    assert predict.main([str(checkpoint), *arguments]) == 0
    first = json.loads((pictures / "a.jsonl").read_text().split("\n")[0])
    assert first["prompt"] == "Who is ?"
    assert first["text"] == plain_answer(
        checkpoint, [user_message("Who is ?", [predict.load_image(pictures, "0.png")])], 4
    )


@pytest.mark.parametrize("checkpoint", ["pad"], indirect=True)
def test_predict_skips_a_question_that_is_too_long(checkpoint, pictures):
    questions = write_questions(pictures)
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    rows[1]["text"] = "x" * 1300
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [str(checkpoint), str(questions), str(pictures / "a.jsonl"), "--image-folder", str(pictures)]
    arguments += ["--max-new-tokens", "6", "--batch-size", "2", "--max-bad-share", "0.2"]
    assert predict.main(arguments) == 0
    (bad,) = [json.loads(line) for line in (pictures / "a.jsonl.bad_rows.jsonl").read_text().splitlines()]
    assert bad["line"] == 2 and "the language model takes 1200" in bad["reason"]
    got = answers(pictures / "a.jsonl")
    assert list(got) == [0, 2, 3, 4, 5, 6]
    images = [predict.load_image(pictures, "0.png")]
    assert got[0] == plain_answer(checkpoint, [user_message("What is ?", images)]), "which stood beside it"


def test_questions_end_at_line_feeds_alone(tmp_path):
    rows = [{"question_id": i, "text": f"a{character}b"} for i, character in enumerate("\u2028\u2029\u0085")]
    path = tmp_path / "questions.jsonl"
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in rows] + [
        b'{"question_id": 3, "text": "\xe2\x80"}'
    ]
    path.write_bytes(b"\r\n".join(lines))
    questions, bad = predict.read_questions(path)
    assert [question.text for question in questions] == [row["text"] for row in rows]
    assert list(bad) == [4] and "no JSON ('utf-8' codec can't decode" in bad[4]


def test_predict_lists_bad_questions(checkpoint, pictures, capsys):
    questions = write_questions(pictures)
    bad = ["{", '{"question_id": 0, "text": "twice"}', '{"question_id": 20, "text": " "}', '{"text": "no id"}']
    bad += ['{"question_id": 21, "image": "../x.png", "text": "?"}', '{"question_id": 22, "image": 3, "text": "?"}']
    (pictures / "broken.png").write_bytes(b"\x89PNG\r\n")
    bad += ['{"question_id": 23, "image": "broken.png", "text": "?"}']
    questions.write_text(questions.read_text() + "\n".join(bad) + "\n")
    output = pictures / "answers.jsonl"
    arguments = [
        str(checkpoint),
        str(questions),
        str(output),
        "--image-folder",
        str(pictures),
        "--max-new-tokens",
        "2",
    ]
    assert predict.main(arguments) == 1
    assert "5 of 14 questions cannot be asked (35.7%; 1.0% may be)" in capsys.readouterr().err
    assert not output.exists()
    assert predict.main([*arguments, "--max-bad-share", "0.5"]) == 0
    assert "7 questions were skipped" in capsys.readouterr().out and len(answers(output)) == 7
    rows = [json.loads(line) for line in (pictures / "answers.jsonl.bad_rows.jsonl").read_text().splitlines()]
    assert [row["line"] for row in rows] == list(range(8, 15))
    reasons = ["no JSON", "line 1 already", "`text`", "`question_id`", "out of", "`image`", "not an image"]
    for row, reason in zip(rows, reasons, strict=True):
        assert reason in row["reason"], row
    assert predict.main([str(checkpoint), str(pictures / "no.jsonl"), str(output)]) == 1


@pytest.mark.parametrize("batch_size", [0, -1])
def test_predict_takes_no_empty_batches(batch_size, tmp_path, capsys):
    """Refused before anything is loaded or written over."""
    (tmp_path / "answers.jsonl").write_text("earlier")
    arguments = ["CHECKPOINT", "questions.jsonl", str(tmp_path / "answers.jsonl"), "--batch-size", str(batch_size)]
    with pytest.raises(SystemExit):
        predict.main(arguments)
    assert f"--batch-size is {batch_size}, expected a positive number" in capsys.readouterr().err
    with pytest.raises(ValueError, match=f"`batch_size` is {batch_size}, expected"):
        predict.predict(None, None, Path("q"), tmp_path / "answers.jsonl", "id", tmp_path, batch_size)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["earlier"]


def test_images_may_be_links_as_in_the_hubs_cache(pictures, tmp_path):
    snapshot = tmp_path / "snapshots" / "commit"
    snapshot.mkdir(parents=True)
    (snapshot / "a.png").symlink_to(Path("..", "..", "1.png"))
    assert predict.load_image(snapshot, "a.png") == predict.load_image(pictures, "1.png")
    for name in ("../../1.png", str(pictures / "1.png"), "../commit-2/1.png"):
        with pytest.raises(ValueError, match="leads out of the image folder"):
            predict.load_image(snapshot, name)


def test_encoder_output_is_unchanged_by_folding(checkpoint, pixels):
    folded, _ = load_checkpoint(checkpoint)
    plain, _ = load_checkpoint(checkpoint, fold=False)
    assert isinstance(plain.model.vision_tower, MoveKDVisionModel)
    with torch.no_grad():
        expected = plain.model.vision_tower(pixels).last_hidden_state
        torch.testing.assert_close(folded.model.vision_tower(pixels).last_hidden_state, expected, atol=1e-4, rtol=1e-4)


def test_several_images_of_a_question_keep_their_places() -> None:
    images = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    asked = {"question_id": 1, "image": ["a.png", "b.png"], "text": "Image 1: <image> Image 2: <image> What differs?"}
    question = predict.parse_question(1, json.dumps(asked).encode())
    content = user_message(question.text, images)["content"]
    assert [part.get("text", part.get("image")) for part in content] == [
        *("Image 1: ", images[0], " Image 2: ", images[1], " What differs?")
    ]
    one = predict.parse_question(1, json.dumps(asked | {"image": "a.png"}).encode())
    assert user_message(one.text, images[:1])["content"][0] == {"type": "image", "image": images[0]}
    assert "<image>" not in one.text
