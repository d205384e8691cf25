"""The pictures of one image as HTML: enlarged, with captions and the experts' shares."""

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
    """Turn uint8 `(height, width, 3)` into an image and enlarge it by a whole factor, up to `SHOWN_SIDE`."""
    image = Image.fromarray(picture.numpy())
    factor = max(1, SHOWN_SIDE // max(image.size))
    return image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)


def captioned(pictures: Any, layer: int, encoders: Sequence[Encoder]) -> list[tuple[str, str, Image.Image]]:
    """Return title, description and image of each picture."""
    shown = [("What the encoder sees", "The image at the encoder's own resolution.", pictures.image)]
    if pictures.experts is not None:
        shown.append(("Experts", "Each patch in the color of its expert.", pictures.experts))
    if pictures.cls_attention is not None:  # a student that started from SigLIP has no [CLS]
        described = "Where the [CLS] token looks, from dark to light. Distillation weighs patches by it."
        shown.append(("[CLS] attention", described, pictures.cls_attention))
    described = "Principal components of the features as red, green and blue: equal colors, similar features."
    shown.append((f"Student, layer {layer + 1}", described, pictures.components))
    for encoder in encoders:
        other = pictures.others[encoder.name]
        described = "Its principal components, in the student's colors as far as the two agree."
        shown.append((encoder.caption(layer)[:1].upper() + encoder.caption(layer)[1:], described, other.components))
    for encoder in encoders:
        other = pictures.others[encoder.name]
        described = (
            "How differently the two relate each patch to the rest of the image, from dark (0, equally) to light (1, "
            f"unrelated); {other.distances[0].mean():.2f} on average."
        )
        shown.append((f"Distance to {encoder.caption(layer)}", described, other.distance))
    return [(title, described, enlarge(picture[0])) for title, described, picture in shown]


def shares(pictures: Any) -> list[dict[str, Any]]:
    """Return the number (from 1), the color `#rrggbb` and the share of the patches (0 to 1) of each expert."""
    if pictures.expert_shares is None:
        return []
    # Checkpoints bring their own code, and older code has the attribute `expert_colours`.
    rgb = pictures.expert_colors if hasattr(pictures, "expert_colors") else pictures.expert_colours
    colors = ["#{:02x}{:02x}{:02x}".format(*color) for color in rgb.tolist()]
    # "colour" is the former name of "color", kept for one release.
    return [
        {"expert": number, "color": color, "colour": color, "share": round(share, 4)}
        for number, (color, share) in enumerate(zip(colors, pictures.expert_shares[0].tolist(), strict=True), start=1)
    ]


def legend(rows: Sequence[dict[str, Any]], layer: int) -> str:
    """Return a table with a bar for each expert."""
    if not rows:
        return "<p>This checkpoint has no experts.</p>"
    body = "".join(
        f'<tr><th scope="row"><span class="swatch" style="background:{row["color"]}"></span>Expert {row["expert"]}'
        f'</th><td class="bar"><span style="width:{100 * row["share"]:.1f}%;background:{row["color"]}"></span></td>'
        f"<td>{100 * row['share']:.1f} %</td></tr>"
        for row in rows
    )
    return f'<table class="shares"><caption>Share of the patches, layer {layer + 1}</caption>{body}</table>'


def page(pictures: Any, layer: int, encoders: Sequence[Encoder], failures: Sequence[str]) -> str:
    """Return the pictures as HTML with embedded data, so that no file is written for them."""
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
        "Other encoders": figures[own : own + len(encoders)],
        "How far the student is from them": figures[own + len(encoders) :],
    }
    grids = [f'<h2>{name}</h2><div class="pictures">{"".join(row)}</div>' for name, row in rows.items() if row]
    return "".join([*grids[:1], legend(shares(pictures), layer), *grids[1:], notes])
