"""
A process with the real Hub client, which runs the code that a test sends to it, against the Hub of [`hub_server`].

    with client(hub, tmp_path, OWNER_TOKEN) as process:
        process.run("from huggingface_hub import HfApi; result = HfApi().whoami()")["name"]

Variables stay from one `run` to the next. `run` returns the variable `result`, sent as JSON. `log` keeps all output
and every traceback.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from traceback import format_exc
from typing import Any


if __name__ != "__main__":
    from tests.helpers.hub_server import Hub

ROOT = Path(__file__).resolve().parents[2]


class ClientError(Exception):
    """What was raised in the process: its class and message."""


class Client:
    def __init__(self, process: subprocess.Popen) -> None:
        self.process, self.log = process, ""

    def run(self, code: str, **variables: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"code": code, "variables": variables}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise ClientError(f"The process ended with status {self.process.wait()}.")
        answer = json.loads(line)
        self.log += answer["output"] + answer.get("traceback", "")
        self.output = answer["output"]
        if "error" in answer:
            raise ClientError(answer["error"])
        return answer["result"]


@contextmanager
def client(hub: "Hub", home: Path, token: str | None = None, **variables: str) -> Iterator[Client]:
    """The process, with an empty cache in `home` unless one is there."""
    environment = hub.environment(home, token, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), **variables)
    process = subprocess.Popen(
        [sys.executable, "-P", __file__],
        env=environment,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield Client(process)
    finally:
        process.stdin.close()  # type: ignore[union-attr]
        try:
            process.wait(timeout=60)
        finally:
            process.kill()


def serve_commands() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else writes to the standard output
    namespace: dict[str, Any] = {}
    for line in sys.stdin:
        command, output = json.loads(line), StringIO()
        namespace.update(command["variables"], result=None)
        answer: dict[str, Any] = {}
        with redirect_stdout(output), redirect_stderr(output):
            try:
                exec(command["code"], namespace)
                answer["result"] = namespace["result"]
            except BaseException as error:
                answer |= {"error": f"{type(error).__name__}: {error}", "traceback": format_exc()}
        answers.write(json.dumps(answer | {"output": output.getvalue()}, default=str) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve_commands()
