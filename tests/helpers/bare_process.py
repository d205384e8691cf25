"""A folder loaded by someone who has nothing of ours installed."""

import json
import subprocess
import sys
from pathlib import Path


# Run by an isolated interpreter, without network and without this repository on its path
STRANGER = """
import importlib.util, json, socket, sys
from pathlib import Path

sys.path[:] = [path for path in sys.path if "site-packages" in path or not (Path(path) / "modeling_movekd").is_dir()]
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
assert importlib.util.find_spec("modeling_movekd") is None and importlib.util.find_spec("train") is None

def refuse(*args, **kwargs):
    raise AssertionError(f"a connection was tried: {args}")

socket.socket.connect = socket.getaddrinfo = refuse
from safetensors.torch import load_file
from transformers import AutoModel

folder = sys.argv[1]
model, saved = AutoModel.from_pretrained(folder, trust_remote_code=True), load_file(folder + "/model.safetensors")
weights = model.state_dict()
assert all((weights[name] == value).all() for name, value in saved.items())
print("REPORT" + json.dumps([type(model).__name__, sorted(weights.keys() - saved.keys())]))
"""


def load_as_stranger(folder: Path, cwd: Path) -> list:
    """The class that `AutoModel` gives for the folder by remote code, and the keys that its file lacks."""
    stranger = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER, str(folder)],
        cwd=cwd,
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd / "cache"), "HOME": str(cwd), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert stranger.returncode == 0, stranger.stderr[-6000:]
    return json.loads(stranger.stdout.split("REPORT")[1])
