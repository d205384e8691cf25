"""The folder for the files of visitors, which only this process can read and which is deleted when it ends."""

import os
import shutil
import tempfile
from pathlib import Path


try:
    import fcntl
except ImportError:  # on Windows, where folders of killed processes stay
    fcntl = None  # type: ignore[assignment]


PREFIX = "movekd-"


def lock(folder: Path) -> bool:
    """Lock a folder until this process ends, and return whether no other process has locked it."""
    if fcntl is None:
        return False
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # locked, or another user's
        return False
    return True


def delete_folders_of_dead_processes() -> None:
    """Delete the folders of processes that were killed and could not do so."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        if lock(folder):
            shutil.rmtree(folder, ignore_errors=True)


delete_folders_of_dead_processes()
# Gradio reads the variable on import, so this module must be imported first.
_FOLDER = tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True)
FOLDER = Path(_FOLDER.name)
lock(FOLDER)
os.environ["GRADIO_TEMP_DIR"] = _FOLDER.name
