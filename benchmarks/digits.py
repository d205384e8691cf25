"""
Write the handwritten digits of scikit-learn as a folder of images, `train` and `test` with a folder for each digit.

    python -m benchmarks.digits outputs/digits

Each digit is small, 28 of 128 pixels, and somewhere on a plain picture, in a dark shade on a light one.
"""

import argparse
from pathlib import Path


SIDE, HEIGHT = 128, 28


def write_digits(folder: Path) -> None:
    """Write the 1,797 digits, a fifth of each into `test`; always the same pictures."""
    # After the arguments are parsed, since these imports take seconds
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    draw = np.random.default_rng(0)
    parts = train_test_split(digits.images, digits.target, test_size=0.2, random_state=0, stratify=digits.target)
    for split, images, labels in (("train", parts[0], parts[2]), ("test", parts[1], parts[3])):
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = folder / split / str(label) / f"{number:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            ink = Image.fromarray((image * 255 / 16).astype("uint8")).resize(
                (HEIGHT, HEIGHT), Image.Resampling.BICUBIC
            )
            light, dark = int(draw.integers(200, 256)), int(draw.integers(0, 60))
            left, top = (int(place) for place in draw.integers(0, SIDE - HEIGHT + 1, 2))
            picture = Image.new("L", (SIDE, SIDE), light)
            picture.paste(dark, (left, top), ink)
            picture.save(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.digits", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    write_digits(parser.parse_args().folder)
