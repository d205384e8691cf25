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


@pytest.fixture(scope="session")
def original(parity_dir: Path) -> Path:
    """The authors' checkpoint after stage 2, in the original layout."""
    return parity_dir / "checkpoint"


@pytest.fixture(scope="session")
def base_models(original: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of the CLIP and the language model under the original checkpoint."""
    from tests.helpers.original_checkpoint import write_base_models  # imports torch

    return write_base_models(original, tmp_path_factory.mktemp("base"))
