"""The paper's eight benchmarks as tasks of lmms-eval, and the paper's numbers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modeling_movekd.files import save_text


TASK_FOLDER = Path(__file__).with_name("lmms_eval_tasks")
WORD = "question, then 'Answer the question using a single word or phrase.'"
LETTER = "'Answer with the option's letter from the given choices directly.'"


@dataclass(frozen=True)
class Benchmark:
    """
    One benchmark as it is run here.

    Args:
        title (`str`): Its name in the paper's table.
        metric (`str`): lmms-eval's metric that is compared.
        scale (`float`): Factor from lmms-eval's scale to the paper's.
        split (`str`): The public split, in words.
        prompt (`str`): The form of the question, in words.
        note (`str`, *optional*): What differs from the paper's measurement.
        task_id (`str`, *optional*): Task in the data set's `eval.yaml`, once the Hub lists the data set as a benchmark
            (`HfApi().list_datasets(benchmark=True)`) that is scored as here. None of these is known to be one.
        paper (`Mapping`, *optional*): The paper's numbers in the order of `COLUMNS`, by size of the language model
            (MoVE-KD, arXiv 2501.01709).
    """

    title: str
    metric: str
    scale: float
    split: str
    prompt: str
    note: str = ""
    paper: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)
    task_id: str | None = None


COLUMNS = ("LLaVA-1.5", "MoVE-KD-v1.0", "MoVE-KD-v1.1")
# The folders of these tasks in lmms-eval, whose thousands of tasks take long to read
LMMS_EVAL_FOLDERS = ("vqav2", "gqa", "textvqa", "vizwiz_vqa", "pope", "scienceqa", "mme", "mmbench")

# By lmms-eval's name of the task; two of them are our own, in `lmms_eval_tasks`
BENCHMARKS = {
    "vqav2_val": Benchmark(
        "VQAv2",
        "exact_match",
        100,
        "validation",
        WORD,
        "the paper's is test-dev, which a server scores",
        {"7B": (78.5, 79.5, 79.9), "13B": (80.0, 80.6, 80.8)},
    ),
    "gqa": Benchmark(
        "GQA", "exact_match", 100, "test-dev balanced", WORD, "", {"7B": (62.0, 63.2, 63.9), "13B": (63.3, 64.2, 63.9)}
    ),
    "textvqa_val_ocr": Benchmark(
        "TextVQA",
        "exact_match",
        100,
        "validation",
        "question, OCR tokens of the data set, then 'Answer the question using a single word or phrase.'",
        "with OCR tokens, as the paper's",
        {"7B": (58.2, 58.3, 59.6), "13B": (61.3, 59.7, 61.1)},
    ),
    "textvqa_val": Benchmark(
        "TextVQA without OCR tokens",
        "exact_match",
        100,
        "validation",
        WORD,
        "no OCR tokens: the paper gives no number",
    ),
    "vizwiz_vqa_val": Benchmark(
        "VizWiz",
        "exact_match",
        100,
        "validation",
        "question, 'When the provided information is insufficient, respond with 'Unanswerable'.', then 'Answer the "
        "question using a single word or phrase.'",
        "the paper's is test, which a server scores",
        {"7B": (50.0, 52.3, 52.7), "13B": (53.6, 55.7, 57.5)},
    ),
    "pope": Benchmark(
        "POPE",
        "pope_f1_score",
        100,
        "test",
        WORD,
        "F1 over the random, popular and adversarial questions together",
        {"7B": (85.9, 86.9, 86.3), "13B": (85.9, 85.7, 86.3)},
    ),
    "scienceqa_img": Benchmark(
        "ScienceQA-IMG",
        "exact_match",
        100,
        "test",
        f"context, question, choices, then {LETTER}",
        "",
        {"7B": (66.8, 69.3, 69.8), "13B": (71.6, 73.2, 71.8)},
    ),
    "mme": Benchmark(
        "MME",
        "mme_perception_score",
        1,
        "test",
        WORD,
        "perception alone, out of 2000; equal runs differ by 20",
        {"7B": (1510.7, 1524.5, 1509.1), "13B": (1531.3, 1568.1, 1568.3)},
    ),
    "mmbench_en_dev_llava": Benchmark(
        "MMBench",
        "gpt_eval_score",
        1,
        "English dev",
        f"hint, question, choices, then {LETTER}",
        "letters are read by lmms-eval's rules instead of the benchmark's server",
        {"7B": (64.3, 66.3, 67.4), "13B": (67.7, 70.2, 69.7)},
    ),
}


def lmms_eval_tasks() -> Path:
    import lmms_eval.tasks

    return Path(lmms_eval.tasks.__file__).parent


def write_tasks(folder: Path) -> Path:
    """
    Write our own tasks to a folder for lmms-eval's `--include_path`, with the paths of the installed task files that
    they include.

    Returns:
        The folder.
    """
    theirs = lmms_eval_tasks()
    folder.mkdir(parents=True, exist_ok=True)
    for source in sorted(TASK_FOLDER.glob("*.yaml")):
        text = source.read_text(encoding="utf-8").replace("\ninclude: ", f"\ninclude: {theirs.as_posix()}/")
        save_text(text, folder / source.name)  # each process of a run writes it
    return folder


def mmbench_prompt(row: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, Any] | None = None) -> str:
    """A question of MMBench as LLaVA asks it: hint, question and choices, a line each."""
    settings = lmms_eval_specific_kwargs or {}
    lines = [] if _missing(row["hint"]) else [row["hint"]]
    lines.append(row["question"])
    lines += [f"{letter}. {row[letter]}" for letter in "ABCDE" if not _missing(row.get(letter))]
    return settings.get("pre_prompt", "") + "\n".join(lines) + settings.get("post_prompt", "")


def _missing(value: Any) -> bool:
    """The data set marks missing values in several ways."""
    return value is None or value != value or str(value).strip().lower() in ("", "nan", "none")
