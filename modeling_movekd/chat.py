"""
Talk to a checkpoint in a terminal, or over a pipe with one question per line.

    python -m modeling_movekd.chat outputs/demo --image picture.png

    /image PATH   add an image to the next question
    /reset        begin a new conversation
    /history      show the conversation
    /help, /exit
"""

import argparse
import sys
from collections.abc import Iterator, Sequence

from .options import add_loading_arguments, add_sampling_arguments, sampling, source


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m modeling_movekd.chat", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("checkpoint", type=source, help="Hub id or folder")
    parser.add_argument("--image", action="append", default=[], metavar="PATH", help="image for the first question")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    add_sampling_arguments(parser)
    add_loading_arguments(parser)
    return parser.parse_args(arguments)


# Before the imports below, which take seconds
if __name__ == "__main__":
    parse_arguments()

import torch
from PIL import Image
from transformers import TextStreamer, set_seed
from transformers.utils import logging

from .images import decode_image
from .inference import Conversation, load_checkpoint


def read_lines(is_terminal: bool) -> Iterator[str]:
    """Yield the lines of standard input, with a prompt and line editing in a terminal."""
    if not is_terminal:
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    try:
        import readline  # noqa: F401  (gives `input` a history, where the platform has it)
    except ImportError:
        pass
    while True:
        try:
            yield input("> ")
        except EOFError:
            return
        except KeyboardInterrupt:
            print()


def show_history(conversation: Conversation) -> None:
    for message in conversation.messages:
        parts = ["<image>" if part["type"] == "image" else part["text"] for part in message["content"]]
        print(f"{message['role']}: {' '.join(parts)}")


def converse(conversation: Conversation, images: list[Image.Image], lines: Iterator[str]) -> int:
    """Answer line by line, print errors on standard error, and return the number of lines that failed."""
    failed = 0
    for line in lines:
        command, _, argument = line.strip().partition(" ")
        try:
            if command in ("/exit", "/quit"):
                break
            if command == "/help":
                print((__doc__ or "").strip())
            elif command == "/reset":
                conversation.reset()
                images.clear()
            elif command == "/history":
                show_history(conversation)
            elif command == "/image":
                images.append(decode_image(argument.strip()))
            elif command.startswith("/"):
                raise ValueError(f"{command} is no command; /help lists the commands.")
            elif line.strip():
                streamer = TextStreamer(conversation.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
                conversation.ask(line.strip(), images, streamer=streamer)
                images.clear()
        except ValueError as error:
            failed += 1
            print(error, file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            print("\nStopped. The question is not part of the conversation.", file=sys.stderr, flush=True)
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    is_terminal = sys.stdin.isatty()
    if not is_terminal:
        logging.disable_progress_bar()
    set_seed(options.seed)
    try:
        images = [decode_image(path) for path in options.image]
        model, processor = load_checkpoint(options.checkpoint, options.revision, options.device, options.dtype)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    conversation = Conversation(model, processor, max_new_tokens=options.max_new_tokens, **sampling(options))
    if is_terminal:
        threads = f", {torch.get_num_threads()} threads" if model.device.type == "cpu" else ""
        print(f"{options.checkpoint} on {model.device}{threads}. /help lists the commands.")
    failed = converse(conversation, images, read_lines(is_terminal))
    return 1 if failed and not is_terminal else 0


if __name__ == "__main__":
    sys.exit(main())
