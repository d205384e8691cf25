"""
Write the handwritten digits of scikit-learn as a folder of images, `train` and `test` with a folder for each digit.

    python -m benchmarks.digits outputs/digits
"""

import argparse
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


SIDE = 64


def write_digits(folder: Path) -> None:
    """Write the 1,797 digits, a fifth of each into `test`, enlarged from 8 to `SIDE` pixels."""
    digits = load_digits()
    parts = train_test_split(digits.images, digits.target, test_size=0.2, random_state=0, stratify=digits.target)
    for split, images, labels in (("train", parts[0], parts[2]), ("test", parts[1], parts[3])):
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = folder / split / str(label) / f"{number:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            gray = Image.fromarray((image * 255 / 16).astype("uint8"))
            gray.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.digits", description=__doc__)
    parser.add_argument("folder", type=Path)
    write_digits(parser.parse_args().folder)
