"""
Run each teacher once over the data set and store its features, so that training needs no teacher.

    python -m train.feature_cache --config train/recipes/X.yaml --feature_cache FOLDER [--cache_dtype int8]
    accelerate launch --num_processes 8 -m train.feature_cache --config train/recipes/X.yaml --feature_cache FOLDER

Then train with the same recipe and `--feature_cache FOLDER`. After an interruption, run the same command again: it
writes the missing files only.
"""

import sys

from train.arguments import CacheArguments, TrainingParser, check_arguments


PROG = "python -m train.feature_cache"


def main(arguments: list[str]) -> None:
    check_arguments(PROG, arguments, CacheArguments)
    from accelerate import PartialState  # with the next, imports torch, which takes seconds

    from train.cache_writer import cache_features

    parser = TrainingParser(PROG, CacheArguments)
    cache_features(*parser.parse_args_and_config(arguments))
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
