import os
from pathlib import Path

import pytest


# Tests run side by side, and their models are too small to gain from more; before torch is imported, and for the
# processes that tests start too
os.environ.setdefault("OMP_NUM_THREADS", "1")

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="session")
def parity_dir(pytestconfig: pytest.Config) -> Path:
    """Folder of golden numbers: the fixtures by default, or what `--parity-dir` names."""
    return pytestconfig.getoption("--parity-dir") or FIXTURES / "parity"
