"""The options that the timing scripts share. Nothing here imports torch, so that arguments are parsed at once."""

import argparse


def parser(description: str, repeats: int = 7) -> argparse.ArgumentParser:
    """The options of every script: `--device --dtype --threads --repeats --toy --out`."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", help="defaults to the first GPU, else the CPU")
    options.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    options.add_argument("--threads", type=int, default=2, help="threads of the CPU")
    options.add_argument("--repeats", type=int, default=repeats, help="rounds; each runs every variant once")
    options.add_argument("--toy", action="store_true", help="tiny shapes, to try the script")
    options.add_argument("--out", help="JSON file that takes the table")
    return options
