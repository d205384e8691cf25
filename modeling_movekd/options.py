"""Options that several commands have. Nothing here imports torch, so that arguments are parsed at once."""

import argparse
import os
from typing import Any


def source(text: str) -> str:
    """Type of an argument: a folder, or an id on the Hub, also as `ID@REVISION`."""
    from .files import check_source  # takes a part of a second, which `--help` does not need

    try:
        check_source(text if os.path.isdir(text) else text.partition("@")[0])
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def add_loading_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--device", help="defaults to the first GPU, else the CPU")
    parser.add_argument("--dtype", help="such as bfloat16; defaults to that of the weights on a GPU, float32 on a CPU")


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, takes the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=42, help="for a temperature above 0")


def sampling(options: argparse.Namespace) -> dict[str, Any]:
    """Turn the options of [`add_sampling_arguments`] into arguments of `generate`."""
    if options.temperature > 0:
        return {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p}
    return {"do_sample": False}
