"""
The paper's eight benchmarks on a checkpoint, through lmms-eval:

    python -m benchmarks.evaluate CHECKPOINT
    python -m benchmarks.evaluate CHECKPOINT --tasks pope mme --batch-size 16 --limit 100
    accelerate launch -m benchmarks.evaluate CHECKPOINT

Writes to --output: `results.json` (lmms-eval's), `predictions/TASK.jsonl` (each answer with its score),
`comparison.md` (beside the paper's numbers) and `evaluation.json`. If every row was asked, `evaluation.json` also goes
into a checkpoint's folder, for its card. After an interruption, the same command continues where it stopped.
"""

import argparse
import hashlib
import importlib.util
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from benchmarks.tasks import BENCHMARKS, COLUMNS, LMMS_EVAL_FOLDERS, lmms_eval_tasks, write_tasks
from hub.card_facts import EvaluationResult, code_revision, hub_id, read_evaluation, weights_fingerprint
from modeling_movekd.files import EVALUATION_NAME, cached_commit, save_json, save_text


# What is downloaded of a checkpoint on the Hub
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
    Run tasks of lmms-eval and write the results.

    Args:
        checkpoint (`str`): Hub id or folder of a whole model.
        tasks (`Sequence`): Names of tasks: lmms-eval's, those of `BENCHMARKS`, or those of `include_path`.
        output (`Path`): Folder that takes the results.
        limit (`int`, *optional*): Rows of each task; by default all.
        include_path (`Path`, *optional*): Folder with more tasks of lmms-eval.

    Returns:
        lmms-eval's results without the samples; `None` on all processes but the first.

    Raises:
        ValueError: for an unknown task, an `evaluation.json` of other weights in the checkpoint's folder, or answers
            of another model in `output`.
        RuntimeError: if a task returns fewer rows than it has, or a number that is not finite. Errors inside a task
            are raised as they are.
    """
    if importlib.util.find_spec("lmms_eval") is None:
        raise ImportError("The benchmarks run in lmms-eval: `pip install -e '.[eval]'`.")
    local = Path(checkpoint).is_dir()
    # Downloaded once: the branch may move in the hours of an evaluation
    folder = Path(checkpoint if local else snapshot_download(checkpoint, revision=revision, allow_patterns=FILES))
    kept = read_evaluation(folder) if local else []
    code = f"{code_revision()}, lmms-eval {version('lmms-eval')}"  # now, as the clone may change meanwhile
    manager = task_manager(tasks, output / "tasks", include_path)
    asked = run_tasks(folder, tasks, manager, output, limit, batch_size, device, dtype)
    if asked is None:
        return None
    results, samples = asked
    content = write_results(results, samples, output, weights_fingerprint(folder), limit, code)
    if local and limit is None and (measured := content["results"]):
        again = {key(EvaluationResult(**result)) for result in measured}
        others = [asdict(result) for result in kept if key(result) not in again]
        save_json(content | {"results": [*others, *measured]}, folder / EVALUATION_NAME)
    return results


def run_tasks(
    folder: Path,
    tasks: Sequence[str],
    manager: Any,
    output: Path,
    limit: int | None,
    batch_size: int,
    device: str | None,
    dtype: str | None,
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Ask the model. Returns lmms-eval's results and samples after a check; `None` on all processes but the first."""
    # The import takes many seconds, which `--help` should not
    from lmms_eval.evaluator import simple_evaluate

    from modeling_movekd.lmms_eval import MoveKDEvaluation

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
    return results, samples


def write_results(
    results: dict[str, Any],
    samples: Mapping[str, Sequence[Any]],
    output: Path,
    weights: str,
    limit: int | None,
    code: str | None = None,
) -> dict[str, Any]:
    """Write the files of `output`. Returns the content of `evaluation.json`."""
    (output / "predictions").mkdir(parents=True, exist_ok=True)
    for task, rows in samples.items():
        lines = (json.dumps(row, ensure_ascii=False, default=str) for row in rows)
        save_text("".join(f"{line}\n" for line in lines), output / "predictions" / f"{task}.jsonl")
    measured = evaluation_results(results, samples, code)
    content = {"results": [asdict(result) for result in measured], "weights": weights}
    save_json(content, output / EVALUATION_NAME)
    save_text(comparison(results, samples, limit), output / "comparison.md")
    save_json(results, output / "results.json")
    return content


def key(result: EvaluationResult) -> tuple[str | None, ...]:
    """Two results with the same key are of the same measurement."""
    return result.dataset, result.subset, result.split, result.metric, result.prompt


def task_manager(tasks: Sequence[str], folder: Path, include_path: Path | None = None) -> Any:
    """
    lmms-eval's `TaskManager` with these tasks.

    Args:
        tasks (`Sequence`): Names of tasks.
        folder (`Path`): Takes the files of our own tasks.
        include_path (`Path`, *optional*): Folder with more tasks.

    Raises:
        ValueError: if there is no task, a task is unknown, or a task in `include_path` has a name that lmms-eval has.
    """
    from lmms_eval.tasks import TaskManager

    folders = [write_tasks(folder), *(lmms_eval_tasks() / name for name in LMMS_EVAL_FOLDERS)]
    own = []
    if include_path is not None:
        if not include_path.is_dir():
            raise ValueError(f"{include_path} is not a folder. Give --include-path a folder that holds YAML files.")
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
            f"lmms-eval knows no task {', '.join(unknown)!r}. The paper's are {', '.join(BENCHMARKS)}. Put tasks of "
            "your own into a folder for --include-path."
        )
    return manager


def identity(folder: Path, dtype: str | None) -> str:
    """16 hex digits that stand for a model's weights, configuration, tokenizer and dtype."""
    digest = hashlib.sha256(f"{weights_fingerprint(folder)} {dtype}".encode())
    names = ("*config.json", "tokenizer*", "*.jinja")
    for path in sorted({path for name in names for path in folder.glob(name) if path.is_file()}):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def check_results(results: Mapping[str, Any], samples: Mapping[str, Sequence[Any]], limit: int | None) -> None:
    """
    Raises:
        RuntimeError: if there is no result, a task has another number of rows, or a number is missing or not finite.
    """
    if not results.get("n-samples"):
        raise RuntimeError("lmms-eval returned without a result. Its log above names the cause.")
    for task, counts in results["n-samples"].items():
        expected = min(counts["original"], limit or counts["original"])
        rows = {row["doc_id"] for row in samples.get(task, [])}
        if len(rows) != expected or not expected:
            raise RuntimeError(f"{task} was scored on {len(rows)} rows, expected {expected}.")
        metrics = {name: value for name, value in results["results"][task].items() if "_stderr" not in name}
        # Files for a benchmark's server are metrics too, but come as nothing or a list
        numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        compared = f"{BENCHMARKS[task].metric},none" if task in BENCHMARKS else next(iter(numbers), None)
        if compared not in numbers or not all(math.isfinite(value) for value in numbers.values()):
            raise RuntimeError(f"{task} returned {metrics}, expected finite numbers, {compared} among them.")


def evaluation_results(
    results: Mapping[str, Any], samples: Mapping[str, Sequence[Any]], code: str | None = None
) -> list[EvaluationResult]:
    """The results of the paper's benchmarks for the checkpoint's card, on lmms-eval's scale."""
    found = []
    for task, benchmark in BENCHMARKS.items():
        if task not in results["n-samples"]:
            continue
        config = results["configs"][task]
        dataset = hub_id(config["dataset_path"])
        found.append(
            EvaluationResult(
                task="image-text-to-text",
                dataset=dataset or task,
                subset=config.get("dataset_name"),
                split=config["test_split"],
                metric=benchmark.metric,
                value=float(results["results"][task][f"{benchmark.metric},none"]),
                prompt=benchmark.prompt,
                dataset_name=f"{benchmark.title} ({benchmark.split})",
                revision=None if dataset is None else cached_commit(dataset, repo_type="dataset"),
                rows=len({row["doc_id"] for row in samples[task]}),
                code=code,
                date=date.today().isoformat(),
                task_id=None if dataset is None else benchmark.task_id,
            )
        )
    return found


def comparison(results: Mapping[str, Any], samples: Mapping[str, Sequence[Any]], limit: int | None = None) -> str:
    """The paper's benchmarks beside the paper's numbers, as Markdown."""
    lines = [
        f"| benchmark | split | rows | empty answers | this checkpoint | {' | '.join(COLUMNS)} | note |",
        f"|---|---|---|---|---|{'---|' * len(COLUMNS)}---|",
    ]
    for task, benchmark in BENCHMARKS.items():
        if task not in results["n-samples"]:
            continue
        value = results["results"][task][f"{benchmark.metric},none"] * benchmark.scale
        empty = sum(not str(row["filtered_resps"][0]).strip() for row in samples[task])
        paper = [" / ".join(f"{row[column]:g}" for row in benchmark.paper.values()) for column in range(3)]
        cells = [benchmark.title, benchmark.split, len(samples[task]), empty, f"**{value:.1f}**", *paper]
        lines.append(f"| {' | '.join(str(cell) for cell in [*cells, benchmark.note])} |")
    lines += ["", f"{', '.join(COLUMNS)}: the paper's numbers (arXiv 2501.01709), 7B / 13B. Splits are public."]
    lines += ["Prompts and metrics are lmms-eval's unless a note says otherwise."]
    if limit is not None:
        lines += ["", f"Only the first {limit} rows of each task were asked. Do not quote these numbers."]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", help="Hub id or folder")
    parser.add_argument("--tasks", nargs="+", default=list(BENCHMARKS), help="names of tasks (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="folder (default: outputs/evaluation/NAME)")
    parser.add_argument("--limit", type=int, help="rows of each task, for a trial; an even number for MME")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--include-path", type=Path, help="folder with more tasks of lmms-eval")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--device", help="default: the GPU of each process, else the CPU")
    parser.add_argument("--dtype", help="such as bfloat16 (default: that of the weights on a GPU, float32 on a CPU)")
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
    except (ValueError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if results is not None:
        print((output / "comparison.md").read_text(encoding="utf-8"))
        print(f"Results and predictions are in {output}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
