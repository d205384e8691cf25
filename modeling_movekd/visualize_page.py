"""The PNG files and the HTML page of `modeling_movekd.visualize`."""

import html
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from .files import temporary_folder
from .visualization_movekd import HEAT_COLORS, MoveKDPictures


# Smaller pictures are enlarged by a whole factor.
SMALLEST_PICTURE = 336
PAGE_NAME, PICTURES_NAME = "index.html", "pictures"
GENERATOR = '<meta name="generator" content="modeling_movekd.visualize">'
STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1c1c22; --soft: #5c5c68; --line: #d9d9e0; --card: #f6f6f9; }
@media (prefers-color-scheme: dark) {
  :root { --back: #15151a; --text: #ededf2; --soft: #a9a9b6; --line: #34343f; --card: #1e1e26; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 80rem; padding: 1rem; background: var(--back); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; } h3 { font-size: 1rem; color: var(--soft); }
p { max-width: 46rem; }
.row { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)); gap: 1rem; }
figure { margin: 0; padding: .6rem; background: var(--card); border: 1px solid var(--line); border-radius: .5rem; }
figure img { display: block; width: 100%; height: auto; border-radius: .25rem; }
figcaption { margin-top: .5rem; font-size: .9rem; }
figcaption ul { list-style: none; margin: .25rem 0 0; padding: 0; display: flex; flex-wrap: wrap; gap: .1rem .9rem; }
.chip { display: inline-block; width: .8em; height: .8em; border-radius: .2em; border: 1px solid var(--line); }
.scale { display: flex; align-items: center; gap: .5rem; font-size: .8rem; color: var(--soft); }
.scale i { flex: 1; height: .6rem; border-radius: .3rem; }
"""
ABOUT = """<p>Experts: the color shows the expert of each patch. [CLS] attention: where the token of the whole image
looks; the distillation weighs the patches by it. Components: the first three principal components of the features as
red, green and blue. Equal colors mean similar features, between encoders too as far as they agree. Distance: how
differently another encoder relates the patch to the rest of the image, from 0 (equally) to 1 (no relation).</p>"""


def to_image(picture: torch.Tensor) -> Image.Image:
    """Turn a picture, uint8 `(height, width, 3)`, into an image."""
    return Image.fromarray(picture.numpy())


def with_legend(picture: Image.Image, entries: Sequence[tuple[tuple[int, int, int], str]]) -> Image.Image:
    """Draw a legend of colors and texts under a picture, in columns as wide as the longest text."""
    font = ImageFont.load_default(size=14)
    line, chip = 20, 12
    column = max(int(font.getlength(text)) for _, text in entries) + 2 * chip + 8
    columns = max(min(picture.width // column, len(entries)), 1)
    rows = -(-len(entries) // columns)
    canvas = Image.new("RGB", (max(picture.width, column), picture.height + rows * line + 8), (255, 255, 255))
    canvas.paste(picture)
    pen = ImageDraw.Draw(canvas)
    for index, (color, text) in enumerate(entries):
        left, top = (index % columns) * column + 4, picture.height + (index // columns) * line + 6
        pen.rectangle((left, top, left + chip, top + chip), fill=color, outline=(90, 90, 90))
        pen.text((left + chip + 6, top - 3), text, fill=(20, 20, 20), font=font)
    return canvas


def expert_entries(pictures: MoveKDPictures, index: int) -> list[tuple[tuple[int, int, int], str]]:
    """Return the color of each expert and a text with its share of the patches of one image."""
    if pictures.expert_shares is None or pictures.expert_colors is None:
        return []
    shares, colors = pictures.expert_shares[index].tolist(), pictures.expert_colors.tolist()
    return [
        ((red, green, blue), f"expert {expert}: {share:.0%}")
        for expert, ((red, green, blue), share) in enumerate(zip(colors, shares, strict=True))
    ]


def slug(name: str) -> str:
    """Turn a name into a part of a file name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "image"


def picture_files(pictures: MoveKDPictures, index: int) -> dict[str, tuple[Image.Image, str]]:
    """Return the pictures of one image and their captions, by the stem of the file name."""
    files = {}
    if pictures.experts is not None:
        entries = expert_entries(pictures, index)
        drawn = with_legend(to_image(pictures.experts[index]), entries)
        files["experts"] = (drawn, "Experts: " + ", ".join(text for _, text in entries))
    if pictures.cls_attention is not None:
        caption = "[CLS] attention, from dark (none) to light (most)"
        files["cls-attention"] = (to_image(pictures.cls_attention[index]), caption)
    files["components"] = (to_image(pictures.components[index]), "Components of the student")
    for name, other in pictures.others.items():
        distance = other.distances[index].mean().item()
        files[f"components-{slug(name)}"] = (to_image(other.components[index]), f"Components of {name}")
        caption = f"Distance of the student to {name}, {distance:.2f} on average"
        files[f"distance-{slug(name)}"] = (to_image(other.distance[index]), caption)
    return files


def check_writable(out: Path, overwrite: bool) -> None:
    """Refuse a file, and a folder with anything but an earlier page unless `overwrite`."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; give a folder as --out.")
    if not out.is_dir() or overwrite or not any(out.iterdir()):
        return
    page = out / PAGE_NAME
    if not page.is_file() or GENERATOR not in page.read_text(encoding="utf-8", errors="replace"):
        raise ValueError(
            f"{out} holds files that this command did not write. Give another folder as --out, or --overwrite to "
            f"replace {PAGE_NAME} and {PICTURES_NAME}/ in it."
        )


def write_page(
    out: Path, title: str, names: Sequence[str], batches: Iterable[dict[int, MoveKDPictures]], overwrite: bool = False
) -> Path:
    """
    Write the pictures and the page, and move them into place when all are complete. Other files in the folder stay.

    Args:
        out (`Path`): The folder.
        title (`str`): Name of the checkpoint.
        names (`Sequence[str]`): Names of the images, in the order of the batches.
        batches (`Iterable`): For each batch of images, the pictures by layer.
        overwrite (`bool`, *optional*, defaults to `False`): Whether the folder may hold other files.

    Returns:
        The path of the page.
    """
    check_writable(out, overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(out) as temporary:
        sections, position = [], 0
        for layers in batches:
            for index in range(len(next(iter(layers.values())).image)):
                sections.append(_section(temporary, names[position], position, layers, index))
                position += 1
        (temporary / PAGE_NAME).write_text(_page(title, sections), encoding="utf-8")
        out.mkdir(exist_ok=True)
        for name in (PICTURES_NAME, PAGE_NAME):
            if (out / name).exists():
                (out / name).replace(temporary / f"old-{name}")
            (temporary / name).replace(out / name)
    return out / PAGE_NAME


def _section(folder: Path, name: str, position: int, layers: dict[int, MoveKDPictures], index: int) -> str:
    """Save the pictures of one image, and return its section of the page."""
    own = Path(PICTURES_NAME) / f"{position + 1:03d}-{slug(Path(name).stem)}"
    (folder / own).mkdir(parents=True)
    first = next(iter(layers.values()))
    to_image(first.image[index]).save(folder / own / "image.png")
    figures = _figure(own / "image.png", to_image(first.image[index]), f"{name}, as the tower sees it", "Image")
    parts = [f"<section><h2>{html.escape(name)}</h2>", f'<div class="row">{figures}</div>']
    for layer, pictures in layers.items():
        figures = ""
        for stem, (picture, caption) in picture_files(pictures, index).items():
            path = own / f"layer-{layer:02d}-{stem}.png"
            picture.save(folder / path)
            alt, legend = f"{name}, layer {layer}: {caption}", ""
            if stem == "experts":
                # The page repeats the legend as text, for other font sizes and screen readers.
                chips = "".join(
                    f'<li><span class="chip" style="background: rgb{color}"></span> {text}</li>'
                    for color, text in expert_entries(pictures, index)
                )
                caption, legend = caption.split(":")[0], f"<ul>{chips}</ul>"
            elif stem == "cls-attention":
                legend = _scale("none", "most in this image")
            elif stem.startswith("distance-"):
                legend = _scale("0", "1 or more")
            figures += _figure(path, picture, alt, caption, legend)
        parts.append(f'<h3>Layer {layer}</h3><div class="row">{figures}</div>')
    return "\n".join([*parts, "</section>"])


def _figure(path: Path, picture: Image.Image, alt: str, caption: str, legend: str = "") -> str:
    size = f'width="{picture.width}" height="{picture.height}"'
    image = f'<img src="{path.as_posix()}" {size} loading="lazy" alt="{html.escape(alt)}">'
    return f"<figure>{image}<figcaption>{html.escape(caption)}{legend}</figcaption></figure>"


def _scale(low: str, high: str) -> str:
    stops = ", ".join(f"rgb{color}" for color in HEAT_COLORS)
    bar = f'<i style="background: linear-gradient(to right, {stops})"></i>'
    return f'<div class="scale"><span>{low}</span>{bar}<span>{high}</span></div>'


def _page(title: str, sections: Sequence[str]) -> str:
    title = html.escape(f"Pictures of {title}")
    body = "\n".join(sections)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{GENERATOR}\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{title}</h1>\n{ABOUT}\n"
        f"{body}\n</main>\n</body>\n</html>\n"
    )
