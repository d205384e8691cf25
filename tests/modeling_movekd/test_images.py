"""Every kind of image a data set of millions holds: read as RGB, or refused with the reason."""

import io
import re
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from modeling_movekd import images
from modeling_movekd.images import MAX_SIDE, decode_image, decode_in_time


def stored(image: Image.Image, format: str = "PNG", **kwargs: object) -> dict[str, object]:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **kwargs)
    return {"bytes": buffer.getvalue(), "path": None}


def noise(mode: str = "RGB", size: tuple[int, int] = (20, 12)) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def assert_same(image: Image.Image, expected: Image.Image) -> None:
    assert image.mode == expected.mode == "RGB" and image.size == expected.size
    assert image.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("mode", "format"),
    [
        *[(mode, "PNG") for mode in ("RGB", "RGBA", "L", "LA", "P", "1")],
        *[(mode, "TIFF") for mode in ("RGB", "CMYK", "LAB")],
        *[("RGB", format) for format in ("BMP", "GIF", "PPM")],
        *[("CMYK", "JPEG"), ("L", "JPEG"), ("P", "GIF")],
    ],
)
def test_modes_and_formats(mode: str, format: str) -> None:
    """The pixels are those of Pillow's conversion, which the authors use."""
    image = stored(noise(mode), format)
    with Image.open(io.BytesIO(image["bytes"])) as opened:
        assert_same(decode_image(image), opened.convert("RGB"))


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "AVIF", "JPEG2000", "MPO"])
def test_lossy_formats(format: str) -> None:
    smooth = Image.linear_gradient("L").resize((32, 32)).convert("RGB")
    difference = np.asarray(decode_image(stored(smooth, format)), dtype=int) - np.asarray(smooth)
    assert abs(difference).max() < 16


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits_keep_the_upper_eight(mode: str, format: str) -> None:
    values = np.arange(48 * 32, dtype=np.uint16).reshape(48, 32) * 40
    image = Image.frombytes(mode, (32, 48), values.astype(">u2" if mode.endswith("B") else "<u2").tobytes())
    decoded = np.asarray(decode_image(stored(image, format)))
    assert (decoded == (values >> 8)[..., None]).all()


def test_twelve_bits_of_a_tiff_file_keep_the_upper_eight() -> None:
    values = np.array([[0, 1000, 2048, 4095], [100, 200, 3000, 4000]])
    packed = int("".join(f"{value:012b}" for value in values.flatten()), 2).to_bytes(12, "big")
    fields = {256: 4, 257: 2, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 2, 279: len(packed)}
    tags = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in fields.items())
    content = b"II*\0" + struct.pack("<I", 8 + len(packed)) + packed + struct.pack("<H", len(fields)) + tags + bytes(4)
    for image in ({"bytes": content}, Image.open(io.BytesIO(content))):
        assert (np.asarray(decode_image(image)) == (values >> 4)[..., None]).all()


@pytest.mark.parametrize("mode", ["La", "RGBa"])
def test_premultiplied_alpha(mode: str) -> None:
    image = Image.new(f"{mode[:-1]}A", (4, 4), (60,) * len(mode[:-1]) + (255,)).convert(mode)
    assert decode_image(image).getpixel((0, 0)) == (60, 60, 60)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_values_without_a_range_are_refused(mode: str) -> None:
    with pytest.raises(ValueError, match=f"mode '{mode}', whose values have no known range"):
        decode_image(stored(Image.new(mode, (4, 4), 70_000), "TIFF"))


def test_palette_with_transparency_and_alpha_show_the_stored_color() -> None:
    image = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert decode_image(stored(image)).getpixel((0, 0)) == (10, 20, 30)
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 40, 50, 60])
    assert decode_image(stored(image, transparency=b"\xff\x00")).getpixel((0, 0)) == (40, 50, 60)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame(format: str) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue", "lime")]
    image = stored(
        frames[0], format, save_all=True, append_images=frames[1:], **({"lossless": True} if format == "WEBP" else {})
    )
    with Image.open(io.BytesIO(image["bytes"])) as opened:
        assert opened.n_frames == 3
    assert_same(decode_image(image), frames[0])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_unless_the_stored_pixels_are_wanted(orientation: int) -> None:
    """Camera pictures say how they are to be turned; the turned ones here are made without that note."""
    way_back = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }[orientation]
    image, exif = noise(), Image.Exif()
    exif[0x0112] = orientation
    turned = image if way_back is None else image.transpose(way_back)
    # Pillow itself turns a TIFF file
    for format in ("PNG", "TIFF"):
        assert_same(decode_image(stored(image, format, exif=exif)), turned)
    assert_same(decode_image(stored(image, exif=exif), apply_orientation=False), image)


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_that_claims(width: int, height: int) -> dict[str, object]:
    """A file of a few bytes whose header promises this size."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return {"bytes": b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b""), "path": None}


@pytest.mark.parametrize(
    ("width", "height"), [(MAX_SIDE + 1, 1), (1, MAX_SIDE + 1), (10_000, 10_000), (60_000, 60_000), (2**31 - 1, 1)]
)
@pytest.mark.filterwarnings("error")
def test_bombs_are_refused_before_they_are_decoded(width: int, height: int) -> None:
    with pytest.raises(ValueError, match=f"{width} x {height} pixels; its sides may have 1 to 9459|DecompressionBomb"):
        decode_image(png_that_claims(width, height))


def test_the_longest_side_is_read() -> None:
    """Long and thin: what counts is the square that it will be padded to."""
    assert decode_image(stored(Image.new("L", (MAX_SIDE, 2)))).size == (MAX_SIDE, 2)
    assert decode_image(stored(noise(size=(20, 12))), max_side=20).size == (20, 12)
    with pytest.raises(ValueError, match="20 x 12 pixels; its sides may have 1 to 19"):
        decode_image(stored(noise(size=(20, 12))), max_side=19)


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
def test_images_without_pixels_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="known format|0 x|x 0"):
        decode_image(png_that_claims(*size))
    with pytest.raises(ValueError, match=f"{size[0]} x {size[1]} pixels"):
        decode_image(Image.new("RGB", size))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated_images_are_refused(format: str, share: float) -> None:
    content = stored(noise(size=(64, 64)), format)["bytes"]
    with pytest.raises(ValueError, match="cannot be decoded|known format"):
        decode_image({"bytes": content[: int(len(content) * share)], "path": None})


def test_flipped_bits_are_refused_or_read() -> None:
    """Whatever a damaged file makes Pillow raise, it comes out as the reason, and nothing else comes out."""
    content = bytearray(stored(noise(size=(64, 64)), "PNG")["bytes"])
    random, refused = np.random.default_rng(0), 0
    for _ in range(300):
        damaged = bytearray(content)
        for position in random.integers(0, len(content), 3):
            damaged[position] ^= 1 << random.integers(8)
        try:
            assert decode_image({"bytes": bytes(damaged), "path": None}).mode == "RGB"
        except ValueError:
            refused += 1
    assert refused > 200


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    noise().save(path)
    for image in (str(path), path, {"bytes": None, "path": str(path)}):
        assert_same(decode_image(image), noise())
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(ValueError, match=r"empty\.jpg: an image of 0 bytes"):
        decode_image(str(tmp_path / "empty.jpg"))
    for missing in ("missing.jpg", "."):
        with pytest.raises(ValueError, match="no such file"):
            decode_image(str(tmp_path / missing))
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    with pytest.raises(ValueError, match=r"page\.jpg: not an image of a known format"):
        decode_image(str(tmp_path / "page.jpg"))
    with pytest.raises(ValueError, match="no such file"):
        decode_image("a\0.png")


@pytest.mark.parametrize("format", ["EPS", "PCX", "PDF", "TGA", "ICO"])
def test_formats_that_no_photograph_has_are_not_opened(format: str) -> None:
    """EPS would start Ghostscript."""
    with pytest.raises(ValueError, match="not an image of a known format"):
        decode_image(stored(noise(), format))


# --- Work that the size of an image does not bound -----------------------------------------------------------------


def progressive(repeats: int = 0) -> bytes:
    """A progressive JPEG file whose last scan comes so many times more."""
    content = stored(noise(size=(64, 64)), "JPEG", progressive=True)["bytes"]
    last = content[content.rindex(b"\xff\xda") : -2]
    return content[:-2] + last * repeats + b"\xff\xd9"


def test_jpeg_files_with_more_scans_than_any_encoder_writes() -> None:
    assert decode_image({"bytes": progressive()}).size == (64, 64)
    assert decode_image({"bytes": progressive(50)}).size == (64, 64)
    for content in (progressive(4000), b"\xff\xd8" + b"\xff\xfe\x00\x02" * 10**6 + progressive()[2:]):
        start = time.monotonic()
        with pytest.raises(ValueError, match="more than 100 scans or 5000 segments"):
            decode_image({"bytes": content})
        assert time.monotonic() - start < 2
    # Markers in a comment, and behind the end of the image, are no scans.
    comment = b"\xff\xfe\xff\xfe" + b"\xff\xda\x00\x02" * 16_383
    content = progressive()
    inside = content[:2] + comment + content[2:] + b"\xff\xda\x00\x02" * 1000
    assert_same(decode_image({"bytes": inside}), decode_image({"bytes": content}))


@pytest.mark.parametrize("kind", [b"P1", b"P2", b"P3"])
def test_ppm_files_in_plain_text(kind: bytes) -> None:
    largest = b"" if kind == b"P1" else b" 1"
    assert decode_image({"bytes": kind + b" 2 2" + largest + b" 1" * 12}).size == (2, 2)
    start = time.perf_counter()
    with pytest.raises(ValueError, match="a PPM file in plain text of more than 1000000 bytes"):
        decode_image({"bytes": kind + b" 900 900" + largest + b" 1" * (900 * 900 * 3)})
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("filler", [b"#" + b"x" * 10**7 + b"\n", b"#\n" * 10**6, b" " * 10**7])
def test_ppm_files_with_long_headers(filler: bytes) -> None:
    content = b"P6\n# by a scanner\n1 1\n255\nabc"
    assert decode_image({"bytes": content + filler}).getpixel((0, 0)) == (97, 98, 99)
    assert decode_image({"bytes": b"P4\n200 800\n" + b" " * 20_000}).size == (200, 800)
    start = time.monotonic()
    for header in (b"P6\n" + filler + b"1 1\n255\n", b"P5\n1 1 " + filler + b"255\n"):
        with pytest.raises(ValueError, match="a PPM file whose header is longer than 10000 bytes"):
            decode_image({"bytes": header + b"abc"})
    assert time.monotonic() - start < 2


@pytest.mark.parametrize(
    ("format", "settings"),
    [
        ("GIF", {}),
        ("GIF", {"duration": 20}),
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("TIFF", {"big_tiff": True}),
        ("AVIF", {}),
        ("MPO", {}),
    ],
)
def test_images_of_more_frames_than_usual(format: str, settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    frames = [Image.fromarray(random.integers(0, 256, (16, 16, 3)).astype(np.uint8)) for _ in range(6)]
    image = stored(frames[0], format, save_all=True, append_images=frames[1:], **settings)
    monkeypatch.setattr(images, "MAX_FRAMES", 6)
    assert decode_image(image).size == (16, 16)
    monkeypatch.setattr(images, "MAX_FRAMES", 5)
    with pytest.raises(ValueError, match="more than 5 frames: send the first one alone"):
        decode_image(image)


def test_jpeg_2000_files_that_are_larger_than_their_header_says(monkeypatch: pytest.MonkeyPatch) -> None:
    content = stored(noise(size=(96, 64)), "JPEG2000", tile_size=(16, 16))["bytes"]
    header = content.index(b"ihdr") + 4
    small = content[:header] + struct.pack(">II", 8, 8) + content[header + 8 :]
    with pytest.raises(ValueError, match="an image of 96 x 64 pixels; its sides may have 1 to 90"):
        decode_image({"bytes": small}, max_side=90)
    assert decode_image({"bytes": content}).size == (96, 64)
    monkeypatch.setattr(images, "MAX_TILES", 20)
    with pytest.raises(ValueError, match="more than 20 tiles"):
        decode_image({"bytes": content})


def test_decoding_in_another_process(tmp_path: Path) -> None:
    """The same pixels, orientation and reasons; the process that takes too long is ended."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for image in (stored(noise(size=(30, 20)), exif=exif), stored(Image.new("I;16", (4, 4), 40_000))):
        assert_same(decode_in_time(image["bytes"], 60), decode_image(image))
    for content in (b"", b"no image", stored(noise())["bytes"][:-30], progressive(4000)):
        with pytest.raises(ValueError) as expected:
            decode_image({"bytes": content})
        with pytest.raises(ValueError, match=re.escape(str(expected.value))):
            decode_in_time(content, 60)
    with pytest.raises(ValueError, match="20 x 12 pixels; its sides may have 1 to 19"):
        decode_in_time(stored(noise())["bytes"], 60, max_side=19)
    with pytest.raises(ValueError, match="decoding takes too long"):
        decode_in_time(stored(noise())["bytes"], 0)  # less than Python needs to start
