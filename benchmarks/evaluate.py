"""
The paper's eight benchmarks on a checkpoint, through lmms-eval:

    python -m benchmarks.evaluate CHECKPOINT
    python -m benchmarks.evaluate CHECKPOINT --tasks pope mme --batch-size 16 --limit 100
    accelerate launch -m benchmarks.evaluate CHECKPOINT

Writes to --output: `results.json` (lmms-eval's), `predictions/TASK.jsonl` (each answer with its score),
`comparison.md` (beside the authors' numbers) and `evaluation.json`, which also goes into a checkpoint's folder, for
its card, if every row was asked. Started again after an interruption it goes on where it stopped.
"""

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from benchmarks.speed.measure import write
from benchmarks.tasks import BENCHMARKS, COLUMNS, LMMS_EVAL_FOLDERS, lmms_eval_tasks, write_tasks
from hub.card_facts import EvaluationResult, hub_id, read_evaluation, weights_fingerprint
from modeling_movekd.files import EVALUATION_NAME


# Of a checkpoint on the Hub
FILES = ["*.json", "*.jinja", "model*.safetensors", "*.model"]


def evaluate(
    checkpoint: str,
    tasks: Sequence[str],
    output: Path,
    limit: int | None = None,
    batch_size: int = 8,
    include_path: Path | None = None,
    revision: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> dict[str, Any] | None:
    """
    Run tasks of lmms-eval and write what came of them; see the module.

    Args:
        checkpoint: Hub id or folder of a whole model.
        tasks: lmms-eval's names, those of `BENCHMARKS`, or those of `include_path`.
        output: Folder that takes the results.
        limit: Rows of each task; all of them if `None`.
        include_path: Folder with more tasks of lmms-eval.

    Returns:
        lmms-eval's results without the samples; `None` on all processes but the first.

    Raises:
        ValueError: for a task that is not known, an `evaluation.json` of other weights in the checkpoint's folder, or
            answers of another model in `output`.
        RuntimeError: if a task has come out with other than all of its rows, or a number that is none. What happens
            inside a task is raised as it is.
    """
    # Takes many seconds: not for `--help`
    from lmms_eval.evaluator import simple_evaluate

    from modeling_movekd.lmms_eval import MoveKDEvaluation

    local = Path(checkpoint).is_dir()
    # `main` may move in the hours that this takes: one commit is evaluated
    folder = Path(checkpoint if local else snapshot_download(checkpoint, revision=revision, allow_patterns=FILES))
    kept = read_evaluation(folder) if local else []
    manager = task_manager(tasks, output / "tasks", include_path)
    model = MoveKDEvaluation(
        str(folder),
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        answers=output / "answers.jsonl",
        identity=identity(folder, dtype),
    )
    results = simple_evaluate(
        model=model,
        tasks=list(tasks),
        task_manager=manager,
        limit=limit,
        batch_size=batch_size,
        log_samples=True,
        bootstrap_iters=0,
        cli_args=argparse.Namespace(output_path=str(output), process_with_media=False),
    )
    if model.rank != 0:
        return None
    samples = (results or {}).pop("samples", {})
    check_results(results or {}, samples, limit)
    assert results is not None
    for task, rows in samples.items():
        lines = (json.dumps(row, ensure_ascii=False, default=str) for row in rows)
        write(output / "predictions" / f"{task}.jsonl", "".join(f"{line}\n" for line in lines))
    measured = evaluation_results(results, samples)
    names = {(result.dataset, result.subset, result.split, result.metric, result.prompt) for result in measured}
    others = [
        result
        for result in kept
        if (result.dataset, result.subset, result.split, result.metric, result.prompt) not in names
    ]
    content = {"results": [asdict(result) for result in measured], "weights": weights_fingerprint(folder)}
    write(output / EVALUATION_NAME, json.dumps(content, indent=2) + "\n")
    if local and limit is None and measured:
        content["results"] = [asdict(result) for result in [*others, *measured]]
        write(folder / EVALUATION_NAME, json.dumps(content, indent=2) + "\n")
    write(output / "comparison.md", comparison(results, samples, limit))
    write(output / "results.json", json.dumps(results, indent=2, default=str) + "\n")
    return results


def task_manager(tasks: Sequence[str], folder: Path, include_path: Path | None = None) -> Any:
    """
    lmms-eval's `TaskManager` that knows the tasks.

    Args:
        folder: Takes the files of the tasks that lmms-eval has not.
        include_path: Folder with more tasks.

    Raises:
        ValueError: if none is asked for, one is not known, or one in `include_path` has the name of another, which
            lmms-eval would take instead.
    """
    from lmms_eval.tasks import TaskManager

    folders = [write_tasks(folder), *(lmms_eval_tasks() / name for name in LMMS_EVAL_FOLDERS)]
    own = []
    if include_path is not None:
        if not include_path.is_dir():
            raise ValueError(f"{include_path} is no folder; --include-path takes one that holds YAML files.")
        own = TaskManager("WARNING", str(include_path), include_defaults=False).all_tasks
    others = not set(tasks) <= {*BENCHMARKS, *own}
    manager = TaskManager("WARNING", [str(path) for path in folders], include_defaults=others, model_name="movekd")
    if taken := sorted(set(own) & set(manager.all_tasks)):
        raise ValueError(f"{', '.join(taken)} in {include_path}: lmms-eval has a task of that name. Choose another.")
    if include_path is not None:
        folders.append(include_path)
        manager = TaskManager("WARNING", [str(path) for path in folders], include_defaults=others, model_name="movekd")
    unknown = sorted(set(tasks) - set(manager.all_tasks))
    if unknown or not tasks:
        raise ValueError(
            f"lmms-eval knows no task {', '.join(unknown)!r}. The paper's are {', '.join(BENCHMARKS)}; tasks of your "
            "own go into a folder for --include-path."
        )
    return manager


def identity(folder: Path, dtype: str | None) -> str:
    """Tells one model's answers from another's: its weights, its text files and its dtype, as 16 hex digits."""
    digest = hashlib.sha256(f"{weights_fingerprint(folder)} {dtype}".encode())
    names = ("*config.json", "tokenizer*", "*.jinja")
    for path in sorted({path for name in names for path in folder.glob(name) if path.is_file()}):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def check_results(results: Mapping[str, Any], samples: Mapping[str, Sequence[Any]], limit: int | None) -> None:
    """
    Raises:
        RuntimeError: if there is no result, a task has other rows than it should, or a number is missing or infinite.
    """
    if not results.get("n-samples"):
        raise RuntimeError("lmms-eval has come back without a result.")
    for task, counts in results["n-samples"].items():
        expected = min(counts["original"], limit or counts["original"])
        rows = {row["doc_id"] for row in samples.get(task, [])}
        if len(rows) != expected or not expected:
            raise RuntimeError(f"{task} was scored on {len(rows)} rows, expected {expected}.")
        metrics = {name: value for name, value in results["results"][task].items() if "_stderr" not in name}
        # What is no number: files for a benchmark's server, which come out as nothing or a list
        numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        compared = f"{BENCHMARKS[task].metric},none" if task in BENCHMARKS else next(iter(numbers), None)
        if compared not in numbers or not all(math.isfinite(value) for value in numbers.values()):
            raise RuntimeError(f"{task} has come out as {metrics}, expected finite numbers, {compared} among them.")


def evaluation_results(results: Mapping[str, Any], samples: Mapping[str, Sequence[Any]]) -> list[EvaluationResult]:
    """What the checkpoint's card says of the paper's benchmarks among the tasks, as lmms-eval gives it."""
    found = []
    for task, benchmark in BENCHMARKS.items():
        if task not in results["n-samples"]:
            continue
        config = results["configs"][task]
        found.append(
            EvaluationResult(
                task="image-text-to-text",
                dataset=hub_id(config["dataset_path"]) or task,
                subset=config.get("dataset_name"),
                split=config["test_split"],
                metric=benchmark.metric,
                value=float(results["results"][task][f"{benchmark.metric},none"]),
                prompt=benchmark.prompt,
                dataset_name=f"{benchmark.title} ({benchmark.split})",
                rows=len({row["doc_id"] for row in samples[task]}),
            )
        )
    return found


def comparison(results: Mapping[str, Any], samples: Mapping[str, Sequence[Any]], limit: int | None = None) -> str:
    """The paper's benchmarks among the tasks beside the authors' numbers, as Markdown."""
    lines = [
        f"| benchmark | split | rows | empty answers | this checkpoint | {' | '.join(COLUMNS)} | note |",
        f"|---|---|---|---|---|{'---|' * len(COLUMNS)}---|",
    ]
    for task, benchmark in BENCHMARKS.items():
        if task not in results["n-samples"]:
            continue
        value = results["results"][task][f"{benchmark.metric},none"] * benchmark.scale
        empty = sum(not str(row["filtered_resps"][0]).strip() for row in samples[task])
        authors = [" / ".join(f"{row[column]:g}" for row in benchmark.authors.values()) for column in range(3)]
        cells = [benchmark.title, benchmark.split, len(samples[task]), empty, f"**{value:.1f}**", *authors]
        lines.append(f"| {' | '.join(str(cell) for cell in [*cells, benchmark.note])} |")
    lines += ["", f"{', '.join(COLUMNS)}: the authors' numbers (arXiv 2501.01709), 7B / 13B. lmms-eval's prompts and"]
    lines += ["metrics where nothing else is said; its public splits."]
    if limit is not None:
        lines += ["", f"Only the first {limit} rows of each task were asked: no number to quote."]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", help="Hub id or folder")
    parser.add_argument("--tasks", nargs="+", default=list(BENCHMARKS), help="by default: %(default)s")
    parser.add_argument("--output", type=Path, help="by default outputs/evaluation/NAME")
    parser.add_argument("--limit", type=int, help="rows of each task, to try it out; even for MME")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--include-path", type=Path, help="folder with more tasks of lmms-eval")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--device", help="by default the GPU of each process, else the CPU")
    parser.add_argument("--dtype", help="such as bfloat16; by default that of the weights on a GPU, float32 on a CPU")
    options = parser.parse_args(arguments)
    if options.limit is not None and options.limit < 1:
        parser.error(f"--limit is {options.limit}, expected a positive number")
    output = options.output or Path("outputs", "evaluation", Path(options.checkpoint).name)
    try:
        results = evaluate(
            options.checkpoint,
            options.tasks,
            output,
            options.limit,
            options.batch_size,
            options.include_path,
            options.revision,
            options.device,
            options.dtype,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if results is not None:
        print((output / "comparison.md").read_text(encoding="utf-8"))
        print(f"Results and predictions are in {output}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
