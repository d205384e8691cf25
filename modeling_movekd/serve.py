"""
Serve a checkpoint by OpenAI's chat completions API.

    python -m modeling_movekd.serve outputs/demo --port 8000

The server takes images as data URLs and answers one request after another. It has no authentication and listens on
127.0.0.1 only. With another --host, everyone who reaches the port may use it.
It needs more packages: pip install "movekd[serve]"
"""

import argparse
import os
import socket
import sys
from collections.abc import Sequence

from .options import add_loading_arguments, source


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m modeling_movekd.serve", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("checkpoint", type=source, help="Hub id or folder")
    parser.add_argument("--name", help="name of the model in requests; defaults to CHECKPOINT")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free port")
    parser.add_argument("--max-new-tokens", type=int, default=1024, help="longest answer, and the default of requests")
    parser.add_argument("--max-prompt-characters", type=int, default=100_000)
    parser.add_argument("--max-images", type=int, default=8, help="in all messages of a request")
    parser.add_argument("--max-image-side", type=int, default=4096, help="in pixels")
    parser.add_argument(
        "--allow-image-urls",
        action="store_true",
        help="download images from http(s) addresses; clients can then\nmake the server connect to any address",
    )
    add_loading_arguments(parser)
    return parser.parse_args(arguments)


# Before the imports below, which take seconds
if __name__ == "__main__":
    parse_arguments()

from transformers.utils import logging
from transformers.utils.import_utils import is_serve_available

from .inference import load_checkpoint


LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


def serve(options: argparse.Namespace, listener: socket.socket) -> int:
    """Load the checkpoint and serve it until a signal ends the process."""
    from .serve_http import build_server
    from .serve_openai import ChatHandler, Limits, build_app

    limits = Limits(
        images=options.max_images,
        image_side=options.max_image_side,
        prompt_characters=options.max_prompt_characters,
        new_tokens=options.max_new_tokens,
        image_urls=options.allow_image_urls,
    )
    try:
        model, processor = load_checkpoint(options.checkpoint, options.revision, options.device, options.dtype)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    name, port = options.name or options.checkpoint, listener.getsockname()[1]
    host = f"[{options.host}]" if ":" in options.host else options.host
    handler = ChatHandler(name, model, processor, limits)
    app = build_app(handler, LOOPBACK if host in LOOPBACK else ("*",))
    server = build_server(app)
    handler.stopping = lambda: server.should_exit
    print(f"{name} on {model.device} at http://{host}:{port}/v1 (stop with Ctrl-C)", flush=True)
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        pass
    os._exit(0)  # Freeing the model, and threads that prepare a request, would take more seconds.


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    if not is_serve_available():
        print('Serving needs fastapi, uvicorn and openai: pip install "movekd[serve]"', file=sys.stderr)
        return 1
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        # The port is opened before the model loads, so that early clients wait instead of failing.
        listener = socket.create_server(
            (options.host, options.port), family=socket.AF_INET6 if ":" in options.host else socket.AF_INET
        )
    except (OSError, OverflowError) as error:
        print(f"{options.host}, port {options.port}: {error}", file=sys.stderr)
        return 1
    with listener:
        return serve(options, listener)


if __name__ == "__main__":
    sys.exit(main())
