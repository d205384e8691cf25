"""
Train a MoVE-KD student.

    accelerate launch train/sft.py                                    # the demo: both stages on generated scenes
    accelerate launch train/sft.py --config train/recipes/X.yaml      # a recipe, which flags override
    accelerate launch train/sft.py --stage pretrain --teachers clip convnext --learning_rate 1e-3 \
        --vision_model openai/clip-vit-large-patch14-336 --language_model lmsys/vicuna-7b-v1.5 \
        --dataset_name blip_laion_cc_sbu_558k.json --image_folder images --output_dir outputs/pretrain
"""

import sys
from itertools import pairwise
from pathlib import Path


# Python puts the script's folder first on the path, where its file names would shadow other packages
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from train.arguments import TrainingParser, check_arguments


PROG = "accelerate launch train/sft.py"


def main(arguments: list[str]) -> None:
    if not arguments or arguments == ["--rebuild_towers"]:
        from train.demo.run import run_demo

        run_demo(rebuild_towers=bool(arguments))
        return
    check_arguments(PROG, arguments)
    from train.run import train  # imports torch and the libraries, which takes seconds

    parser = TrainingParser(PROG)
    recipe = dict(pairwise(arguments)).get("--config")
    data_args, args, model_args = parser.parse_args_and_config(arguments)
    trainer = train(data_args, args, model_args, recipe)
    trainer.end()
    if trainer.args.push_to_hub:
        trainer.publish()  # after `end`, so that no process waits for the upload


if __name__ == "__main__":
    main(sys.argv[1:])
