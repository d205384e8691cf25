"""The folder for the files of visitors, which only this process can read and which is deleted when it ends."""

import os
import tempfile
from pathlib import Path


# Gradio reads the variable on import, so this module must be imported first.
_FOLDER = tempfile.TemporaryDirectory(prefix="movekd-", ignore_cleanup_errors=True)
FOLDER = Path(_FOLDER.name)
os.environ["GRADIO_TEMP_DIR"] = _FOLDER.name
