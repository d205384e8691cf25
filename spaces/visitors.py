"""The folder for what visitors send: this run's own, which nobody else may read and which ends with it."""

import os
import tempfile
from pathlib import Path


# Gradio reads the variable when it is imported, so this comes first; Python removes the folder when it ends
_FOLDER = tempfile.TemporaryDirectory(prefix="movekd-", ignore_cleanup_errors=True)
FOLDER = Path(_FOLDER.name)
os.environ["GRADIO_TEMP_DIR"] = _FOLDER.name
