"""The pictures of one image as a page: crisp enlargements, captions, and who took which share."""

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

import torch
from encoders import Encoder
from PIL import Image


SHOWN_SIDE = 448


def enlarge(picture: torch.Tensor) -> Image.Image:
    """uint8 `(height, width, 3)` as an image of at least half `SHOWN_SIDE`, each pixel a whole square."""
    image = Image.fromarray(picture.numpy())
    factor = max(1, SHOWN_SIDE // max(image.size))
    return image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)


def captioned(pictures: Any, layer: int, encoders: Sequence[Encoder]) -> list[tuple[str, str, Image.Image]]:
    """Title, description and picture, one after the other."""
    shown = [("What the encoder sees", "The image at the encoder's own resolution.", pictures.image)]
    if pictures.experts is not None:
        shown.append(("Experts", "Each patch in the colour of the expert that took it.", pictures.experts))
    described = "Where the [CLS] token looks: dark is nowhere, light is most. Distillation weighs patches by it."
    shown.append(("[CLS] attention", described, pictures.cls_attention))
    described = "Principal components of the features as red, green and blue: like colours, like features."
    shown.append((f"Student, layer {layer + 1}", described, pictures.components))
    for encoder in encoders:
        other = pictures.others[encoder.name]
        described = "Its principal components, turned to the student's colours as far as the two agree."
        shown.append((encoder.caption(layer)[:1].upper() + encoder.caption(layer)[1:], described, other.components))
    for encoder in encoders:
        other = pictures.others[encoder.name]
        described = (
            f"How differently the two relate each patch to the rest of the image: dark is 0, light is 1 (unrelated) "
            f"or more; {other.distances[0].mean():.2f} on average."
        )
        shown.append((f"Distance to {encoder.caption(layer)}", described, other.distance))
    return [(title, described, enlarge(picture[0])) for title, described, picture in shown]


def shares(pictures: Any) -> list[dict[str, Any]]:
    """Of each expert its number (from 1), its colour `#rrggbb` and its share of the patches, 0 to 1."""
    if pictures.expert_shares is None:
        return []
    colours = ["#{:02x}{:02x}{:02x}".format(*colour) for colour in pictures.expert_colours.tolist()]
    values = pictures.expert_shares[0].tolist()
    return [
        {"expert": number, "colour": colour, "share": round(share, 4)}
        for number, (colour, share) in enumerate(zip(colours, values, strict=True), start=1)
    ]


def legend(rows: Sequence[dict[str, Any]], layer: int) -> str:
    """A table with a bar for each expert."""
    if not rows:
        return "<p>This checkpoint has no experts.</p>"
    body = "".join(
        f'<tr><th scope="row"><span class="swatch" style="background:{row["colour"]}"></span>Expert {row["expert"]}'
        f'</th><td class="bar"><span style="width:{100 * row["share"]:.1f}%;background:{row["colour"]}"></span></td>'
        f"<td>{100 * row['share']:.1f} %</td></tr>"
        for row in rows
    )
    return f'<table class="shares"><caption>Share of the patches, layer {layer + 1}</caption>{body}</table>'


def page(pictures: Any, layer: int, encoders: Sequence[Encoder], failures: Sequence[str]) -> str:
    """
    The pictures in the page itself, as data: no file is written for them.
    """
    figures = []
    for title, described, image in captioned(pictures, layer, encoders):
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        data = base64.b64encode(buffer.getvalue()).decode()
        figures.append(
            f'<figure><img src="data:image/png;base64,{data}" width="{image.width}" height="{image.height}" '
            f'alt="{html.escape(f"{title}. {described}")}"><figcaption><b>{html.escape(title)}</b><br>'
            f"{html.escape(described)}</figcaption></figure>"
        )
    notes = "".join(f"<p>{html.escape(sentence)}</p>" for sentence in failures)
    own = len(figures) - 2 * len(encoders)
    rows = {
        "The student": figures[:own],
        "Other encoders beside it": figures[own : own + len(encoders)],
        "How far the student is from them": figures[own + len(encoders) :],
    }
    grids = [f'<h2>{name}</h2><div class="pictures">{"".join(row)}</div>' for name, row in rows.items() if row]
    return "".join([*grids[:1], legend(shares(pictures), layer), *grids[1:], notes])
