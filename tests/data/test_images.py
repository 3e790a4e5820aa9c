"""Images of every kind against Pillow, NumPy and closed formulas; downloads from a real HTTP server."""

import contextlib
import http.server
import io
import struct
import threading
import time
from urllib.error import HTTPError

import numpy as np
import pytest
import torch
from hub_server import serving
from PIL import Image, features

from convmixer.data import download
from convmixer.data.images import enough, image_suffixes, is_one_image, read_image
from convmixer.errors import ArgumentError, ImageError


def values(image):
    """Pixels as numbers that may be subtracted."""
    return np.asarray(image).astype(np.int64)


def same(image, expected, tolerance=0):
    assert image.mode == ("L" if np.ndim(expected) == 2 else "RGB")
    assert values(image).shape == np.shape(expected)
    assert np.abs(values(image) - expected).max() <= tolerance


# ---- files ----------------------------------------------------------------------------------------------------------

# How a camera stores an upright image under each orientation of EXIF: the inverse of what a viewer has to do.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind", ["path", "str", "PIL"])
def test_exif_orientation(arrow, tmp_path, orientation, kind):
    method = STORED[orientation]
    stored = arrow if method is None else arrow.transpose(method)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "photo.png"  # lossless
    stored.save(path, exif=exif)
    if kind == "PIL":
        with Image.open(path) as image:
            result = read_image(image)
    else:
        result = read_image(path if kind == "path" else str(path))
    same(result, values(arrow))


def test_orientation_of_a_jpeg_of_a_camera(photo, tmp_path):
    upright = Image.fromarray(photo[:256, :384])
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "photo.jpg", quality=95, exif=exif)
    result = read_image(tmp_path / "photo.jpg")
    assert result.size == (384, 256)
    assert np.abs(values(result) - values(upright)).mean() < 4


@pytest.mark.parametrize(
    ("tag", "kind", "value"),
    [
        (0x011A, 2, b"72\0\0"),  # a resolution that is a text
        (0x0100, 2, b"32\0\0"),  # so is a width
        (0x8298, 3, b"\1\0\0\0"),  # the owner of the copyright is a number
    ],
)
def test_orientation_beside_a_tag_of_a_wrong_type(tag, kind, value):
    """Which Pillow cannot write again; viewers do not care."""
    entries = [(0x0112, 3, 1, b"\6\0\0\0"), (tag, kind, len(value) if kind == 2 else 1, value)]
    fields = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in sorted(entries))
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + fields + bytes(4)
    stream = io.BytesIO()
    Image.new("RGB", (32, 16)).save(stream, "JPEG")
    jpeg = stream.getvalue()
    segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    assert read_image(jpeg[:2] + segment + jpeg[2:]).size == (16, 32)


def test_an_image_is_turned_once(arrow, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    arrow.save(tmp_path / "photo.jpg", exif=exif)
    turned = read_image(tmp_path / "photo.jpg")
    assert turned.size == arrow.size[::-1]
    assert read_image(turned).size == turned.size


def test_orientation_does_not_change_the_image_given(arrow, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    arrow.save(tmp_path / "photo.png", exif=exif)
    with Image.open(tmp_path / "photo.png") as image:
        read_image(image)
        assert image.size == arrow.size
        assert image.getexif()[0x0112] == 6


@pytest.mark.parametrize("name", ["cat.png", "coffee.png", "camera.png"])
def test_photographs(cat, name):
    path = cat.parent / name
    with Image.open(path) as image:
        grey, colour = image.convert("L"), image.convert("RGB")
    same(read_image(path), values(colour))
    same(read_image(path, channels=1), values(grey))


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "webp", "ppm", "gif", "jpg"])
def test_formats(photo, tmp_path, suffix):
    image = Image.fromarray(photo[:64, :96])
    path = tmp_path / f"photo.{suffix}"
    image.save(path, **({"lossless": True} if suffix == "webp" else {}))
    result = read_image(path)
    assert result.size == (96, 64)
    assert result.mode == "RGB"
    lossy = suffix in ("gif", "jpg")
    assert np.abs(values(result) - values(image)).mean() < (12 if lossy else 1e-9)


def test_the_file_types_are_those_that_pillow_opens(photo, tmp_path):
    wanted = {"jpg", "jpeg", "jfif", "png", "bmp", "tif", "tiff", "webp", "gif", "ppm", "pgm"}
    assert {f".{suffix}" for suffix in wanted} <= image_suffixes()
    assert (".avif" in image_suffixes()) == features.check("avif")
    image = Image.fromarray(photo[:64, :96])
    for suffix in image_suffixes():
        path = tmp_path / f"photo{suffix}"
        image.convert("1" if suffix == ".pbm" else "RGB").save(path)
        assert read_image(path).size == (96, 64)


def test_heic_is_read_where_pillow_heif_is_installed(photo, tmp_path):
    pytest.importorskip("pillow_heif", reason="the heic extra is not installed")
    assert {".heic", ".heif"} <= image_suffixes()
    image = Image.fromarray(photo[:64, :96])
    image.save(tmp_path / "photo.heic", quality=95)
    assert np.abs(values(read_image(tmp_path / "photo.heic")) - values(image)).mean() < 6


def test_grey(photo, tmp_path):
    grey = photo[:64, :96, 1]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    same(read_image(tmp_path / "grey.png"), np.stack([grey] * 3, axis=2))
    same(read_image(tmp_path / "grey.png", channels=1), grey)


def test_black_and_white(tmp_path):
    bits = np.eye(5, dtype=bool)
    Image.fromarray(bits).save(tmp_path / "bits.png")
    same(read_image(tmp_path / "bits.png", channels=1), 255 * bits)


def test_transparency_is_laid_on_white(photo, tmp_path):
    """colour * alpha + white * (1 - alpha), for every alpha."""
    colour = photo[:16, :256]
    alpha = np.broadcast_to(np.arange(256, dtype=np.uint8), (16, 256))[:, :, None]
    Image.fromarray(np.concatenate([colour, alpha], axis=2)).save(tmp_path / "clear.png")
    share = alpha / 255
    same(read_image(tmp_path / "clear.png"), np.round(colour * share + 255 * (1 - share)), tolerance=1)


def test_grey_with_transparency(tmp_path):
    pixels = np.array([[[0, 255], [0, 0], [200, 255], [0, 128]]], dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "clear.png")
    with Image.open(tmp_path / "clear.png") as image:
        assert image.mode == "LA"
    same(read_image(tmp_path / "clear.png", channels=1), [[0, 255, 200, 127]], tolerance=1)


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_palette_with_transparency(tmp_path, suffix):
    image = Image.new("P", (4, 2), 0)
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    image.putpixel((2, 1), 2)
    image.save(tmp_path / f"palette.{suffix}", transparency=0)
    expected = np.full((2, 4, 3), 255)  # the red of index 0 is transparent
    expected[0, 1], expected[1, 2] = (0, 255, 0), (0, 0, 255)
    same(read_image(tmp_path / f"palette.{suffix}"), expected)


def test_palette_without_transparency(tmp_path):
    image = Image.new("P", (2, 1), 0)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "palette.png")
    same(read_image(tmp_path / "palette.png"), np.array([[[255, 0, 0], [0, 255, 0]]]))


@pytest.mark.parametrize("channels", [1, 3])
def test_16_bit_grey(tmp_path, channels):
    """0 to 65535 is mapped to 0 to 255 (Pillow alone would clip everything above 255)."""
    deep = np.linspace(0, 65535, 64 * 16).astype(np.uint16).reshape(16, 64)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    expected = np.round(deep / 257)
    expected = expected if channels == 1 else np.stack([expected] * 3, axis=2)
    same(read_image(tmp_path / "deep.png", channels), expected)


def test_dark_16_bit_grey_stays_dark(tmp_path):
    Image.fromarray(np.full((4, 4), 200, np.uint16)).save(tmp_path / "deep.png")
    same(read_image(tmp_path / "deep.png", channels=1), np.ones((4, 4)))


def test_cmyk(photo, tmp_path):
    cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    cyan.save(tmp_path / "cyan.jpg", quality=100)
    same(read_image(tmp_path / "cyan.jpg"), np.broadcast_to((0, 255, 255), (16, 16, 3)), tolerance=3)
    Image.fromarray(photo[:64, :64]).convert("CMYK").save(tmp_path / "photo.jpg", quality=95)
    assert np.abs(values(read_image(tmp_path / "photo.jpg")) - photo[:64, :64]).mean() < 6


def test_the_result_outlives_the_file(arrow, tmp_path):
    path = tmp_path / "arrow.png"
    arrow.save(path)
    result = read_image(path)
    path.unlink()
    same(result, values(arrow))


# ---- files that are no good -----------------------------------------------------------------------------------------


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ImageError, match=r"no image at .*none\.png"):
        read_image(tmp_path / "none.png")
    with pytest.raises(ImageError, match=r"cannot read .*" + tmp_path.name):
        read_image(tmp_path)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"<svg xmlns='http://www.w3.org/2000/svg'/>"])
def test_what_is_no_image(tmp_path, content):
    (tmp_path / "odd.png").write_bytes(content)
    with pytest.raises(ImageError, match=r"odd\.png' is not an image that Pillow can read"):
        read_image(tmp_path / "odd.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "webp"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.95])
def test_truncated_file(photo, tmp_path, suffix, part):
    path = tmp_path / f"short.{suffix}"
    Image.fromarray(photo).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(ImageError, match=rf"short\.{suffix}"):
        read_image(path)


def test_an_image_too_large_to_be_meant(arrow, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    arrow.save(tmp_path / "huge.png")
    with pytest.raises(ImageError, match=r"cannot read .*huge\.png.*: Image size"):
        read_image(tmp_path / "huge.png")


def test_an_open_image_that_is_truncated(photo, tmp_path):
    """Pillow reads pixels late: the fault shows only when they are used."""
    Image.fromarray(photo).save(tmp_path / "short.png")
    content = (tmp_path / "short.png").read_bytes()
    (tmp_path / "short.png").write_bytes(content[: len(content) // 2])
    with Image.open(tmp_path / "short.png") as image, pytest.raises(ImageError, match="cannot read"):
        read_image(image)


# ---- arrays and tensors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [("uint8", 1), ("uint16", 257), ("float16", 1 / 255), ("float32", 1 / 255), ("float64", 1 / 255)],
)
@pytest.mark.parametrize("kind", ["array", "tensor", "tensor, channels first"])
def test_a_photograph_in_any_type(photo, dtype, scale, kind):
    """The same picture, whatever the numbers mean white by."""
    part = photo[:64, :96]
    array = (part * np.float64(scale)).round(0 if scale >= 1 else 12).astype(dtype)
    if kind != "array":
        array = torch.from_numpy(array)
        array = array.permute(2, 0, 1) if "first" in kind else array
    same(read_image(array), part)


def test_a_tensor_in_bfloat16(photo):
    part = photo[:64, :96]
    same(read_image(torch.from_numpy(part / 255).bfloat16()), part, tolerance=1)


def test_a_mask():
    mask = np.eye(6, 4, dtype=bool)
    same(read_image(mask, channels=1), 255 * mask)
    same(read_image(torch.from_numpy(mask), channels=1), 255 * mask)


@pytest.mark.parametrize("shape", [(16, 24), (16, 24, 1)])
def test_grey_arrays(photo, shape):
    grey = photo[:16, :24, 0]
    same(read_image(grey.reshape(shape)), np.stack([grey] * 3, axis=2))
    same(read_image(torch.from_numpy(grey.copy()).view(shape), channels=1), grey)
    same(read_image(torch.from_numpy(grey.copy())[None], channels=1), grey)


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_four_channels_are_colour_and_alpha(photo, kind):
    pixels = np.concatenate([photo[:8, :8], np.zeros((8, 8, 1), np.uint8)], axis=2)
    same(read_image(kind(pixels)), np.full((8, 8, 3), 255))


def test_views_and_lists_and_gradients(photo):
    part = photo[:32, :48]
    same(read_image(part[::-2, ::3]), part[::-2, ::3])
    same(read_image(np.asfortranarray(part)), part)
    same(read_image(torch.tensor(part / 255, requires_grad=True)), part)


@pytest.mark.parametrize(
    "shape", [(), (5,), (8, 8, 2), (8, 8, 5), (3, 8, 8), (2, 8, 8, 3), (0, 8, 3), (8, 0), (8, 8, 0)]
)
def test_array_shapes_that_are_no_image(shape):
    text = ", ".join(map(str, shape))
    with pytest.raises(ImageError, match=rf"array of shape \({text},?\): give \(H, W\)"):
        read_image(np.zeros(shape, np.uint8))


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (2, 8, 8), (5, 8, 8)])
def test_tensor_shapes_that_are_no_image(shape):
    with pytest.raises(ImageError, match=r"array of shape .*: give \(H, W\)"):
        read_image(torch.zeros(shape))


@pytest.mark.parametrize("dtype", ["int8", "complex64", "object", "<U3", "datetime64[s]"])
def test_types_that_are_no_image(dtype):
    with pytest.raises(ImageError, match=r"array of .*: give uint8, uint16, bool, larger integers or floats"):
        read_image(np.zeros((8, 8), dtype))


# ---- what is white --------------------------------------------------------------------------------------------------

# All ways to write the same grey values, 0 to 255, in numbers whose white is known or follows from the values.
RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
NUMBERS = {
    "u1": RAMP,
    **{f"{order}u2": (RAMP * np.uint16(257)).astype(f"{order}u2") for order in "<>"},
    **{f"{kind} of 255": RAMP.astype(kind) for kind in (">i4", "<i4", "<i2", ">i8", "u4", "u8", ">f4", "f2", "f8")},
    **{f"{kind} of 65535": RAMP.astype(kind) * np.array(257, kind) for kind in (">i4", "<i8", "u4", ">f4", "f8")},
    **{f"{kind} of 1": (RAMP / 255).astype(kind) for kind in ("f2", "<f4", ">f4", "f8", ">f8")},
}


@pytest.mark.parametrize("name", NUMBERS)
def test_arrays_of_all_numbers_are_the_same_picture(name):
    array = NUMBERS[name]
    same(read_image(array, channels=1), RAMP)
    same(read_image(np.stack([array] * 3, axis=2)), np.stack([RAMP] * 3, axis=2))
    if array.dtype.isnative:
        same(read_image(torch.from_numpy(array), channels=1), RAMP)


def _pillow_images():
    """Images of Pillow's modes for single numbers, as made in memory."""
    yield "L", Image.fromarray(RAMP)
    for mode, order in {"I;16": "<", "I;16L": "<", "I;16B": ">"}.items():
        yield mode, Image.frombytes(mode, (16, 16), (RAMP * np.uint16(257)).astype(f"{order}u2").tobytes())
    for white in (255, 65535):
        yield f"I of {white}", Image.fromarray(RAMP.astype(np.int32) * (white // 255))
        yield f"F of {white}", Image.fromarray(RAMP.astype(np.float32) * (white // 255))
    yield "F of 1", Image.fromarray((RAMP / 255).astype(np.float32))


@pytest.mark.parametrize(("name", "image"), list(_pillow_images()), ids=lambda x: x if isinstance(x, str) else "")
def test_pillow_images_of_all_numbers_are_the_same_picture(name, image, tmp_path):
    same(read_image(image, channels=1), RAMP)
    same(read_image(image), np.stack([RAMP] * 3, axis=2))
    image.save(tmp_path / "image.tiff")
    same(read_image(tmp_path / "image.tiff", channels=1), RAMP)


@pytest.mark.parametrize(("order", "kind"), [("<", "i4"), (">", "i4"), ("<", "i2"), (">", "i2"), ("<", "u4")])
def test_tiff_files_of_integers_written_by_another_library(tmp_path, order, kind):
    """Values of 0 to 255 are not black, in either byte order."""
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "image.tif", RAMP.astype(kind), byteorder=order)
    same(read_image(tmp_path / "image.tif", channels=1), RAMP)


def test_a_dark_pgm_file_of_16_bits_stays_dark(tmp_path):
    """It opens in mode I, as its 65536 values would in another type of file."""
    (tmp_path / "dark.pgm").write_bytes(b"P5 2 1 65535\n" + np.array([0, 200], ">u2").tobytes())
    same(read_image(tmp_path / "dark.pgm", channels=1), [[0, 1]])
    (tmp_path / "light.pgm").write_bytes(b"P5 2 1 65535\n" + np.array([257, 65535], ">u2").tobytes())
    same(read_image(tmp_path / "light.pgm", channels=1), [[1, 255]])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy, Image.fromarray, "tiff"])
@pytest.mark.parametrize("most", [1, 255])
def test_values_that_are_not_finite(tmp_path, value, kind, most):
    array = np.full((8, 8), 0.5 * most, np.float32)
    array[3, 3] = value
    if kind == "tiff":
        Image.fromarray(array).save(tmp_path / "image.tiff")
    source = tmp_path / "image.tiff" if kind == "tiff" else kind(array)
    with pytest.raises(ImageError, match=r"1 of 64 values are not finite \(NaN or infinite\): correct them"):
        read_image(source)


@pytest.mark.parametrize("value", [-0.01, 1.01, 15.0, -3.0, 256.0, 4000.0, 65536.0, 1e30])
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy, Image.fromarray])
def test_floats_of_which_nobody_knows_what_is_white(value, kind):
    """A sharpened image in [0, 1] goes beyond 1 a little: as one of 0 to 255 it would be black."""
    array = np.full((8, 8), 0.5, np.float32)
    array[3, 3] = value
    with pytest.raises(ImageError, match=r"with values from .* to .*: give values in \[0, 1\] as floats"):
        read_image(kind(array))


@pytest.mark.parametrize("value", [-1, 256, 4095, 65536, 2**31 - 1])
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy, Image.fromarray])
def test_integers_of_which_nobody_knows_what_is_white(value, kind):
    array = np.full((8, 8), 100, np.int32)
    array[3, 3] = value
    with pytest.raises(ImageError, match=r"mode 'I' with values|array of int32 with values"):
        read_image(kind(array))


@pytest.mark.parametrize("mode", Image.MODES)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_of_pillow(mode, channels):
    """White paper is white in all of them, but where 0 is meant by it."""
    result = read_image(Image.new(mode, (4, 3)), channels)
    assert (result.size, result.mode) == ((4, 3), "RGB" if channels == 3 else "L")


@pytest.mark.parametrize("mode", ["La", "LA", "RGBa", "RGBA"])
def test_transparency_in_every_mode_is_laid_on_white(mode):
    clear = Image.new("LA", (2, 1), (0, 255))
    clear.putpixel((1, 0), (0, 0))
    image = clear.convert("RGBA" if mode.startswith("RGB") else "LA")
    same(read_image(image.convert(mode), channels=1), [[0, 255]], tolerance=1)


@pytest.mark.parametrize("source", [None, 3, b"bytes", object, {"a": 1}, [[1, 2], [3]], "a\0b"], ids=str)
def test_objects_that_are_no_image(source):
    with pytest.raises(ImageError):
        read_image(source)


@pytest.mark.parametrize("channels", [0, 2, 4])
def test_other_channel_counts(arrow, channels):
    with pytest.raises(ArgumentError, match=f"images have 1 or 3 channels, this model takes {channels}"):
        read_image(arrow, channels)


# ---- bytes, files and addresses -------------------------------------------------------------------------------------


def test_bytes_and_file_objects(photo, tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(photo[:64, :96]).save(path)
    content = path.read_bytes()
    file = io.BytesIO(content)
    file.seek(0, io.SEEK_END)
    for source in (content, bytearray(content), memoryview(content), file):
        same(read_image(source), photo[:64, :96])
    with path.open("rb") as opened:
        same(read_image(opened), photo[:64, :96])
        assert not opened.closed


def test_bytes_and_files_that_are_no_image(tmp_path):
    with pytest.raises(ImageError, match="what these 5 bytes hold is not an image that Pillow can read"):
        read_image(b"hello")
    (tmp_path / "note.txt").write_text("hello")
    with (tmp_path / "note.txt").open("rb") as file, pytest.raises(ImageError, match=r"note\.txt' is not an image"):
        read_image(file)
    with (tmp_path / "note.txt").open() as file, pytest.raises(ImageError, match=r"note\.txt'"):
        read_image(file)  # opened for text
    with pytest.raises(ImageError, match=r"cannot read '.*note\.txt'"):
        read_image(file)  # closed
    with pytest.raises(ImageError, match="this BytesIO is not an image"):
        read_image(io.BytesIO())


def test_what_opencv_gives_for_a_missing_file():
    with pytest.raises(ImageError, match=r"None is not an image\. cv2\.imread returns None where there is no such"):
        read_image(None)


def test_what_is_one_image(tmp_path):
    ones = ["a.png", tmp_path, b"", Image.new("L", (1, 1)), np.zeros((2, 2)), torch.zeros(2, 2), io.BytesIO(), None, {}]
    assert all(map(is_one_image, ones))
    assert not any(map(is_one_image, [[], (), iter([]), {1}, np.array(["a"]), range(3), (x for x in "ab")]))


class _Handler(http.server.BaseHTTPRequestHandler):
    """Answers by path: what is written there, or a fault of that name."""

    protocol_version = "HTTP/1.1"
    content: bytes

    def do_GET(self):
        assert "convmixer" in self.headers["User-Agent"]
        content, length = self.content, None
        if self.path.startswith("/moved"):
            self.send_response(302)
            self.send_header("Location", "/photo.png" if self.path == "/moved" else "file:///etc/passwd")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if self.path == "/hangs":
            self.server.stop.wait(30)
        if self.path == "/huge":
            length = 10**12
        if self.path == "/short":
            content, length = content[:100], len(content)
        if self.path == "/text":
            content = b"<html>no image</html>"
        self.send_response(404 if self.path == "/none" else 200)
        chunked = self.path in ("/endless", "/drips")
        self.send_header(*(("Transfer-Encoding", "chunked") if chunked else ("Content-Length", length or len(content))))
        self.end_headers()
        with contextlib.suppress(OSError):
            while chunked and not self.server.stop.wait(0.02 if self.path == "/drips" else 0):
                piece = b"x" * (1 if self.path == "/drips" else 2**16)
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            self.wfile.write(content)
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def server(photo):
    """The address of a real HTTP server with a photograph and every fault."""
    buffer = io.BytesIO()
    Image.fromarray(photo[:64, :96]).save(buffer, "PNG")
    handler = type("Handler", (_Handler,), {"content": buffer.getvalue()})
    with serving(handler) as listening:
        listening.stop = threading.Event()
        try:
            yield f"http://127.0.0.1:{listening.server_port}"
        finally:
            listening.stop.set()


@pytest.mark.parametrize("path", ["photo.png", "moved", "a photo of a c\u00e4t.png?size=1&x=%20"])
def test_an_address(server, photo, path):
    same(read_image(f"{server}/{path}"), photo[:64, :96])
    same(read_image(f"{server.replace('http', 'HTTP')}/{path}"), photo[:64, :96])


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("none", "cannot fetch http://.*/none: the server answers 404 Not Found"),
        ("moved/away", "cannot fetch http://.*: "),
        ("huge", "http://.*/huge is larger than 0.25 MiB: download it, and give its path"),
        ("endless", "http://.*/endless is larger than 0.25 MiB"),
        ("short", r"cannot fetch http://.*/short: it broke off after 100 of \d+ bytes"),
        ("text", "'http://.*/text' is not an image that Pillow can read"),
        ("hangs", "cannot fetch http://.*/hangs: .*timed out"),
        ("drips", "cannot fetch http://.*/drips: not done after 0.5 seconds"),
    ],
)
def test_addresses_that_give_no_image(server, monkeypatch, path, text):
    for name, value in {"MOST_BYTES": 2**18, "MOST_SILENCE": 0.3, "MOST_SECONDS": 0.5}.items():
        monkeypatch.setattr(download, name, value)
    begun = time.monotonic()
    with pytest.raises(ImageError, match=text) as caught:
        read_image(f"{server}/{path}")
    assert time.monotonic() - begun < 10
    answer = caught.value.__cause__
    assert not isinstance(answer, HTTPError) or answer.fp.closed


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/a.png", "http://", "https:///a.png", "http://a b/c", "http://[/a"])
def test_addresses_that_lead_nowhere(url):
    with pytest.raises(ImageError, match="cannot fetch http"):
        read_image(url)


# ---- large photographs ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(photo, tmp_path_factory):
    """A JPEG photograph of 1280 x 960 pixels."""
    path = tmp_path_factory.mktemp("large") / "large.jpg"
    Image.fromarray(photo).resize((1280, 960), Image.Resampling.BICUBIC).save(path, quality=92)
    return path


@pytest.mark.parametrize(
    ("least", "size"),
    [
        ((64, 64), (160, 120)),
        ((160, 120), (160, 120)),
        ((161, 120), (320, 240)),
        ((160, 121), (320, 240)),
        ((640, 480), (640, 480)),
        ((641, 480), (1280, 960)),
        (None, (1280, 960)),
    ],
)
def test_a_photograph_is_reduced_as_far_as_it_still_is_large_enough(large, least, size):
    for source in (large, large.read_bytes()):
        result = read_image(source, least=least)
        assert result.size == size
    with Image.open(large) as image:
        exact = image.convert("RGB")
    near = values(exact.resize(size, Image.Resampling.BOX))
    assert np.abs(values(result) - near).mean() < 2
    if size == exact.size:
        same(result, values(exact))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_reduced_photograph_is_upright(photo, tmp_path, orientation):
    upright = Image.fromarray(photo).resize((1600, 800), Image.Resampling.BICUBIC)
    stored = upright if STORED[orientation] is None else upright.transpose(STORED[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "photo.jpg", quality=95, exif=exif)
    asked = []
    result = read_image(tmp_path / "photo.jpg", least=lambda *size: asked.append(size) or (400, 100))
    assert asked == [(1600, 800)]
    assert result.size == (400, 200)
    assert np.abs(values(result) - values(upright.resize((400, 200), Image.Resampling.BOX))).mean() < 3


def test_smaller_images_and_other_files_are_the_same_to_the_bit(photo, large, tmp_path):
    exact = read_image(large)
    exact.save(tmp_path / "large.png")
    Image.fromarray(photo).resize((999, 1000)).save(tmp_path / "small.jpg")
    with Image.open(large) as image:  # somebody else's: it may be used again
        sources = [tmp_path / "large.png", tmp_path / "small.jpg", image, values(exact).astype(np.uint8)]
        for source in sources:
            same(read_image(source, least=(8, 8)), values(read_image(source)))
        assert image.size == (1280, 960)


def test_enough_is_twice_what_a_transform_keeps():
    assert enough(224, 224, 0.875) == (512, 512)
    assert enough(32, 64) == (128, 64)
