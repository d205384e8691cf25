"""`--parity-dir DIR` and `--parity-dir=DIR` are the same, wherever pytest is started and wherever the folder lies."""

import subprocess
import sys
from pathlib import Path

import pytest


TESTS = Path(__file__).parent
LOSSES = TESTS / "train" / "distillation" / "test_losses_parity.py"
PYTEST = (sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "-m", "parity")


@pytest.fixture
def numbers(tmp_path: Path) -> Path:
    """A folder outside of the clone, without any numbers."""
    folder = tmp_path / "numbers"
    folder.mkdir()
    return folder


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PYTEST, *command], cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("spelling", ["--parity-dir {}", "--parity-dir={}"])
def test_the_folder_of_numbers_is_not_taken_for_one_of_tests(numbers: Path, spelling: str) -> None:
    # Run where there are no tests to collect: what counts is that the clone's setup.cfg and the option are known
    found = run(["--collect-only", *spelling.format(numbers).split()], TESTS / "fixtures")
    assert found.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, found.stdout + found.stderr
    assert "configfile: setup.cfg" in found.stdout


def test_a_test_reads_the_folder(numbers: Path) -> None:
    found = run([f"{LOSSES}::test_balance_loss", "--parity-dir", str(numbers)], numbers.parent)
    assert found.returncode == pytest.ExitCode.TESTS_FAILED, found.stdout + found.stderr
    assert f"in {numbers}" in found.stdout
