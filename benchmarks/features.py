"""
Nearest neighbors and a linear probe of an encoder's features, on a labeled set of images.

    python -m benchmarks.features ENCODER --data FOLDER --clip openai/clip-vit-large-patch14-336

ENCODER is a whole model or an encoder alone. `datasets.load_dataset` must be able to read FOLDER: a folder of images
for each class, with or without `train` and `test` above them, or Parquet files. Without a test split, a fifth of the
rows of each class is held out.
"""

import argparse
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


NEIGHBORS = 20


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.features",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("encoder", help="Hub id or folder of a whole model or an encoder alone")
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="labeled images")
    parser.add_argument(
        "--clip",
        metavar="ID",
        help="plain CLIP, or the student's SigLIP, to compare with: Hub id (ID@REVISION) or folder",
    )
    parser.add_argument("--image-column")
    parser.add_argument("--label-column")
    parser.add_argument("--neighbors", "--neighbours", type=int, default=NEIGHBORS)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--revision", help="branch, tag or commit of the encoder on the Hub")
    parser.add_argument("--out", type=Path, help="JSON file that takes the numbers")
    return parser.parse_args(arguments)


# Before the imports below, which take seconds
if __name__ == "__main__":
    parse_arguments()

import numpy as np
import torch
from datasets import ClassLabel, Dataset, load_dataset
from datasets import Image as ImageFeature
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from modeling_movekd.files import save_json
from modeling_movekd.images import decode_image, shared_crop
from modeling_movekd.inference import load_tower
from modeling_movekd.vision_encoders import OtherEncoder


FOLDS = 3
# Candidates of the cross-validation within the training split
INVERSE_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
TEST_SPLITS = ("test", "validation")

Tokens = Callable[[Sequence[Image.Image]], torch.Tensor]


@dataclass
class Accuracy:
    """
    One encoder's features, scored on the test split.

    Args:
        features (`str`): `patch mean` or `[CLS]`.
        knn, linear (`float`): Accuracies on the test split, from 0 to 1.
        rows (`int`): Number of test rows.
        inverse_penalty (`float`): The inverse penalty that was chosen for the linear probe.
    """

    encoder: str
    features: str
    knn: float
    linear: float
    rows: int
    inverse_penalty: float


def load_rows(data: Path, image_column: str | None = None, label_column: str | None = None) -> tuple[Dataset, Dataset]:
    """
    The training and the test rows, with the columns `image` and `label`.

    Args:
        data (`Path`): A folder that `datasets.load_dataset` reads.
        image_column (`str`, *optional*): By default the only column of images.
        label_column (`str`, *optional*): By default `label`, or the only column of classes.

    Raises:
        ValueError: if a column is ambiguous, a label is missing, or the training split lacks a class of the test.
    """
    if not data.is_dir():
        raise ValueError(f"{data}: no such folder. Give --data a folder of labeled images.")
    splits = load_dataset(str(data))
    rows = next(iter(splits.values()))
    kinds = rows.features
    image_column = image_column or _only(
        [name for name in kinds if isinstance(kinds[name], ImageFeature)], "image", rows
    )
    classes = [name for name in kinds if isinstance(kinds[name], ClassLabel)]
    label_column = label_column or ("label" if "label" in kinds else _only(classes, "label", rows))
    for name in (image_column, label_column):
        if name not in kinds:
            raise ValueError(f"{data} has no column {name!r}, but {list(kinds)}. Name one of them.")
    test = next((name for name in TEST_SPLITS if name in splits), None)
    if "train" not in splits or (len(splits) > 1 and test is None):
        raise ValueError(f"{data} has the splits {list(splits)}. It needs `train`, and `test` or `validation`.")
    chosen = [splits["train"]] if test is None else [splits["train"], splits[test]]
    chosen = [part.select_columns([image_column, label_column]) for part in chosen]
    names = {image_column: "image", label_column: "label"}
    chosen = [part.rename_columns({old: new for old, new in names.items() if old != new}) for part in chosen]
    for part in chosen:
        if any(label is None or label == -1 for label in part["label"]):
            raise ValueError(f"{data} has rows without a label. Remove them.")
    if test is None:
        labels = np.asarray(chosen[0]["label"])
        held = np.zeros(len(labels), dtype=bool)
        generator = np.random.default_rng(0)
        for label in np.unique(labels):
            members = generator.permutation(np.flatnonzero(labels == label))
            held[members[: max(1, len(members) // 5)]] = True
        chosen = [chosen[0].select(np.flatnonzero(~held)), chosen[0].select(np.flatnonzero(held))]
    train, test_rows = chosen
    if unknown := sorted(set(test_rows["label"]) - set(train["label"])):
        raise ValueError(f"The test split of {data} has classes that the training split lacks: {unknown}.")
    return train, test_rows


def _only(names: Sequence[str], what: str, rows: Dataset) -> str:
    if len(names) != 1:
        raise ValueError(f"The columns are {rows.column_names}. Name the {what} column by --{what}-column.")
    return names[0]


def load_encoders(encoder: str, clip: str | None = None, revision: str | None = None) -> dict[str, Tokens]:
    """
    By name, a function from RGB images to float32 tokens `(batch_size, num_tokens, hidden_size)`, [CLS] first if there
    is one. Plain CLIP's tokens are those of the student's last layer, on the same crops.
    """
    tower, processor = load_tower(encoder, revision)

    def student(images: Sequence[Image.Image]) -> torch.Tensor:
        pixels = processor(images=list(images), return_tensors="pt")["pixel_values"].to(tower.device)
        if pixels.dim() == 5:  # the first tile of anyres is the whole image
            pixels = pixels[:, 0]
        return tower(pixels).last_hidden_state.float()

    functions: dict[str, Tokens] = {Path(encoder).name: student}
    if clip is not None:
        other = OtherEncoder(clip, tower.device)
        depth = tower.config.num_hidden_layers

        def plain(images: Sequence[Image.Image]) -> torch.Tensor:
            pixels = other.preprocess([shared_crop(image, processor) for image in images]).to(tower.device)
            hidden = other.model(pixel_values=pixels, output_hidden_states=True).hidden_states
            if len(hidden) <= depth:
                raise ValueError(
                    f"{clip} has {len(hidden) - 1} layers, the student {depth}. Give the model that it started from."
                )
            return hidden[depth].float()

        functions[f"{other.name}, layer {depth}"] = plain
    return functions


@torch.inference_mode()
def extract(tokens: Tokens, rows: Dataset, batch_size: int = 32, name: str = "") -> dict[str, np.ndarray]:
    """
    Features of all rows by kind (`patch mean`, and `[CLS]` if there is one), float32 `(num_rows, hidden_size)`.

    Raises:
        ValueError: if a feature is not finite.
    """
    kinds: dict[str, list[np.ndarray]] = {"patch mean": [], "[CLS]": []}
    with tqdm(total=len(rows), desc=name, unit="image") as progress:
        for start in range(0, len(rows), batch_size):
            images = [decode_image(image) for image in rows[start : start + batch_size]["image"]]
            found = tokens(images)
            prefix = found.shape[1] - math.isqrt(found.shape[1]) ** 2  # the patches are on a square grid
            kinds["patch mean"].append(found[:, prefix:].mean(dim=1).cpu().numpy())
            if prefix:
                kinds["[CLS]"].append(found[:, 0].cpu().numpy())
            progress.update(len(images))
    features = {kind: np.concatenate(parts) for kind, parts in kinds.items() if parts}
    if not all(np.isfinite(values).all() for values in features.values()):
        raise ValueError(f"The encoder {name} gives features that are not finite. Check its weights.")
    return features


def nearest_neighbors(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    neighbors: int = NEIGHBORS,
) -> float:
    """Accuracy of a vote of the `neighbors` training rows with the highest cosine."""
    classifier = KNeighborsClassifier(n_neighbors=neighbors, metric="cosine")
    return float(classifier.fit(train, train_labels).score(test, test_labels))


def linear_probe(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray
) -> tuple[float, float]:
    """
    Accuracy of a logistic regression on standardized features, and its inverse penalty, which cross-validation within
    the training rows chooses.
    """
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    search = GridSearchCV(pipeline, {"logisticregression__C": INVERSE_PENALTIES}, cv=FOLDS)
    search.fit(train, train_labels)
    return float(search.score(test, test_labels)), float(search.best_params_["logisticregression__C"])


def evaluate_features(
    functions: dict[str, Tokens], train: Dataset, test: Dataset, neighbors: int = NEIGHBORS, batch_size: int = 32
) -> list[Accuracy]:
    """
    Raises:
        ValueError: if there are fewer training rows than neighbors, one class alone, or a class of fewer training
            rows than cross-validation has folds.
    """
    labels = {"train": np.asarray(train["label"]), "test": np.asarray(test["label"])}
    _, counts = np.unique(labels["train"], return_counts=True)
    if len(counts) < 2 or counts.min() < FOLDS or len(train) < neighbors:
        raise ValueError(
            f"The training split has {len(train)} rows, {len(counts)} classes, and {counts.min()} rows of the rarest; "
            f"it needs at least {neighbors}, 2 and {FOLDS}."
        )
    found = []
    for name, tokens in functions.items():
        of_train = extract(tokens, train, batch_size, f"{name}, training")
        of_test = extract(tokens, test, batch_size, f"{name}, test")
        for kind in of_train:
            split = (of_train[kind], labels["train"], of_test[kind], labels["test"])
            linear, penalty = linear_probe(*split)
            knn = nearest_neighbors(*split, neighbors)
            found.append(Accuracy(name, kind, knn, linear, len(test), penalty))
    return found


def table(found: Sequence[Accuracy], test_labels: Sequence[Any], neighbors: int = NEIGHBORS) -> str:
    """Accuracies in percent with their 95 % intervals, as Markdown."""
    _, counts = np.unique(np.asarray(test_labels), return_counts=True)
    lines = [f"| encoder | features | {neighbors} nearest neighbors | linear probe |", "|---|---|---|---|"]
    for row in found:
        shown = [f"{100 * share:.1f} ± {100 * _interval(share, row.rows):.1f}" for share in (row.knn, row.linear)]
        lines.append(f"| {row.encoder} | {row.features} | {shown[0]} | {shown[1]} |")
    chance = 100 * counts.max() / counts.sum()
    lines += ["", f"{counts.sum()} test images of {len(counts)} classes; the most frequent class: {chance:.1f}."]
    return "\n".join(lines) + "\n"


def _interval(share: float, rows: int) -> float:
    return 1.96 * math.sqrt(share * (1 - share) / rows)


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse_arguments(arguments)
    if any(argument.startswith("--neighbou") for argument in arguments):
        warnings.warn("`--neighbours` is now `--neighbors`; the next release drops it.", FutureWarning, stacklevel=2)
    try:
        train, test = load_rows(options.data, options.image_column, options.label_column)
        functions = load_encoders(options.encoder, options.clip, options.revision)
        found = evaluate_features(functions, train, test, options.neighbors, options.batch_size)
        print(table(found, test["label"], options.neighbors))
        if options.out is not None:
            content = {"neighbors": options.neighbors, "rows": {"train": len(train), "test": len(test)}}
            content["accuracies"] = [asdict(row) for row in found]
            options.out.parent.mkdir(parents=True, exist_ok=True)
            save_json(content, options.out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
