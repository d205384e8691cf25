"""
Run each teacher once over the data set and store its features, so that training needs no teacher.

    python -m train.feature_cache --config train/recipes/X.yaml --feature_cache FOLDER [--cache_dtype int8]
    accelerate launch --num_processes 8 -m train.feature_cache --config train/recipes/X.yaml --feature_cache FOLDER

Then train with the same recipe and `--feature_cache FOLDER`. After an interruption, run the same command again: it
writes the missing files only.
"""

import sys

from accelerate import PartialState

from train.arguments import TrainingParser
from train.cache_writer import CacheArguments, cache_features


def main(arguments: list[str]) -> None:
    parser = TrainingParser("python -m train.feature_cache", CacheArguments)
    cache_features(*parser.parse_args_and_config(arguments))
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
