from pathlib import Path

import pytest


FIXTURES = Path(__file__).parent / "fixtures"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--parity-dir",
        type=Path,
        default=FIXTURES / "parity",
        help="Folder with the golden numbers the tests marked `parity` are held against.",
    )


@pytest.fixture(scope="session")
def parity_dir(pytestconfig: pytest.Config) -> Path:
    """Folder of golden numbers: the fixtures by default, or what `--parity-dir` names."""
    return pytestconfig.getoption("--parity-dir")
