"""
Greedy answers of a checkpoint by vLLM's `LLM.generate`. Run by the interpreter of an environment that has vLLM:

    python -I tests/helpers/vllm_answers.py CHECKPOINT REQUESTS.json ANSWERS.json TOKENS TENSOR_PARALLEL_SIZE

`REQUESTS.json` lists `{"prompt": ..., "images": [PATH, ...]}`, and `ANSWERS.json` becomes the list of their token ids.
"""

import json
import sys
from pathlib import Path

from PIL import Image
from vllm import LLM, SamplingParams


def main(checkpoint: str, requests: str, answers: str, tokens: str, ranks: str) -> None:
    llm = LLM(
        checkpoint,
        trust_remote_code=True,
        dtype="float32",
        tensor_parallel_size=int(ranks),
        enforce_eager=True,
        limit_mm_per_prompt={"image": 3},
        disable_log_stats=True,
    )
    prompts = json.loads(Path(requests).read_text())
    for prompt in prompts:
        if images := [Image.open(path) for path in prompt.pop("images")]:
            prompt["multi_modal_data"] = {"image": images}
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=int(tokens)), use_tqdm=False)
    Path(answers).write_text(json.dumps([list(output.outputs[0].token_ids) for output in outputs]))


if __name__ == "__main__":  # vLLM's workers import this file
    main(*sys.argv[1:])
