"""What is being written has a name of its own, is locked, and is removed after its process was killed."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from hub.files import new_folder
from modeling_movekd.files import new_file, temporary_folder


def in_a_process(write: Callable[[], None]) -> int:
    """Run a function in a process that then waits to be killed. Returns its id when the function has returned."""
    reader, writer = os.pipe()
    if child := os.fork():
        os.close(writer)
        assert os.read(reader, 1) == b"x"
        os.close(reader)
        return child
    try:
        write()
        os.write(writer, b"x")
        signal.pause()
    finally:
        os._exit(1)


def end(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def write_folder(path: Path) -> None:
    with new_folder(path) as folder:
        (folder / "big").write_text("x")


def write_file(path: Path) -> None:
    with new_file(path) as temporary:
        temporary.write_text("x")


@pytest.mark.parametrize("name", ["dest", "a [b] c", "a.json"])
@pytest.mark.parametrize(("manager", "write"), [(new_folder, write_folder), (new_file, write_file)])
def test_a_killed_process_leaves_nothing_behind_for_long(tmp_path: Path, name: str, manager, write) -> None:
    path, others = tmp_path / name, [".dest.1.partial", ".other.0123abcd.partial", "file"]
    for other in others:
        (tmp_path / other).mkdir()
    entered = []

    def begin() -> None:
        entered.append(manager(path))
        begun = entered[0].__enter__()
        (begun / "big" if begun.is_dir() else begun).write_text("x")

    children = [in_a_process(begin) for _ in range(2)]
    partial = set(tmp_path.glob(f".{name.replace('[', '[[]')}.????????.partial"))
    assert len(partial) == 2
    # Both are alive: a third writer leaves them alone
    write(path)
    assert path.exists() and partial <= set(tmp_path.iterdir())
    path.rename(tmp_path / "first")
    end(children[0])
    write(path)
    assert len(partial & set(tmp_path.iterdir())) == 1
    path.rename(tmp_path / "second")
    end(children[1])
    write(path)
    assert {it.name for it in tmp_path.iterdir()} == {name, "first", "second", *others}


def test_a_folder_that_is_removed_before_it_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process may take it for a leftover: then it gets another name."""
    mkdir, made = Path.mkdir, []

    def mkdir_and_lose(path: Path, *args, **kwargs) -> None:
        mkdir(path, *args, **kwargs)
        made.append(path)
        if len(made) == 1:
            path.rmdir()

    monkeypatch.setattr(Path, "mkdir", mkdir_and_lose)
    with temporary_folder(tmp_path / "dest") as folder:
        assert folder.is_dir() and len(made) == 2 and folder == made[1]
    assert not list(tmp_path.iterdir())
