"""
The option `--parity-dir` of the parity tests, which has to be known before pytest loads the first `conftest.py`.

`movekd_tests-0.dist-info` in the root of the clone names this module as a pytest plugin.
"""

from pathlib import Path

import pytest


OPTION = "--parity-dir"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        OPTION,
        type=Path,
        help="Folder with the golden numbers that the tests marked `parity` compare with.",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(args: list[str]) -> None:
    # pytest looks for setup.cfg beside every argument that is a path, before it loads a plugin. Written with a space,
    # the folder of `--parity-dir DIR` is such an argument, so start again with the spelling `--parity-dir=DIR`.
    if OPTION in args[:-1]:
        place = args.index(OPTION)
        joined = f"{OPTION}={args[place + 1]}"
        raise SystemExit(pytest.main([*args[:place], joined, *args[place + 2 :]]))
