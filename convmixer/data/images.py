"""Read one image, from a file, a URL, bytes, a PIL image or an array, as an upright 8-bit image."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError, features

from convmixer.data.download import download
from convmixer.errors import ArgumentError, ImageError

# File types of images; `image_suffixes` says which of them Pillow opens here.
SUFFIXES: tuple[str, ...] = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".tif", ".tiff", ".webp", ".gif")
SUFFIXES += (".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif", ".heic", ".heif")

LARGE = 1_000_000  # pixels from which on a photograph may be decoded at a reduced scale
MARGIN = 2  # times as many pixels per side as are needed then remain

_ORIENTATION = 0x0112  # of EXIF; from 5 on width and height change places
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Files whose 16-bit greys open in mode I, which has 32 bits.
_DEEP_FORMATS = ("PNG", "PPM")

Size = tuple[int, int]  # (width, height)


@functools.lru_cache(maxsize=1)
def image_suffixes() -> frozenset[str]:
    """Return the suffixes of image files that all commands read: those of `SUFFIXES` that Pillow opens here.

    HEIC files are among them where pillow-heif is installed (`pip install 'convmixer[heic]'`).
    """
    _load_plugins()
    formats = Image.registered_extensions()  # without those whose library Pillow lacks
    found = {suffix for suffix in SUFFIXES if formats.get(suffix) in Image.OPEN}
    return frozenset(found if features.check("jpg_2000") else found - {".jp2"})


@functools.lru_cache(maxsize=1)
def _load_plugins() -> None:
    with contextlib.suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()


def enough(height: int, width: int, crop_pct: float = 1.0) -> Size:
    """Return the (width, height) from which on an image is large enough to be resized to an input of that size.

    It is twice what the image is resized to, before `crop_pct` of it is cropped.
    """
    return MARGIN * math.floor(width / crop_pct), MARGIN * math.floor(height / crop_pct)


def check_channels(channels: int) -> None:
    """Raise an ArgumentError for a model that takes other images than RGB and grey ones."""
    if channels not in (1, 3):
        raise ArgumentError(f"images have 1 or 3 channels, this model takes {channels}: call it with tensors instead")


def read_image(
    source: Any, channels: int = 3, *, least: Size | Callable[[int, int], Size] | None = None
) -> Image.Image:
    """Read an upright 8-bit RGB image (grey for `channels=1`) from a file, a URL, bytes, a PIL image or an array.

    EXIF rotation is applied, and transparency is laid on white. Numbers become 0 to 255 by what is white among them, in
    any byte order:

    - Booleans, 8 bits, unsigned 16 bits, and PNG and PGM files of 16 bits: the largest value of the type.
    - Other integers, as of PIL's mode I, of TIFF files with 32 bits, of int64: 255, or 65535 if a value exceeds that.
    - Floats, as of PIL's mode F: 1, or 255 if a value exceeds that, or 65535.

    A white that is not the first of these counts only if a value reaches a sixteenth of it. Otherwise the meaning is
    unclear, as an image in [0, 1] goes a little beyond 1 when it is sharpened. This is an error, as are negative
    values, larger ones, and values that are not finite.

    Args:
        source: A path; an http or https URL of at most 64 MiB; the bytes of a file; a binary file object, read from its
            start; a PIL image; an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of numbers; a tensor of the same, or
            channels-first.
        channels: 1 or 3.
        least: (width, height) that the result must have at least, or a function that is called once with those of the
            upright image and returns it. JPEG photographs of a megapixel or more that are at least twice as large on
            each side are then decoded at 1/2, 1/4 or 1/8 of their scale, which takes less time. None decodes every
            pixel.

    Raises:
        ImageError: It cannot be read.
        ArgumentError: `channels` is neither 1 nor 3.

    Example:
        >>> from convmixer.data.images import read_image
        >>> read_image("cat.png").mode, read_image("cat.png", channels=1).mode
        ('RGB', 'L')
    """
    check_channels(channels)
    if isinstance(source, Image.Image):
        image = _decode(source, repr(source), least, ours=False)
    elif (file := _as_file(source)) is not None:
        image = _open(file, _name(source), least)
    else:
        image = _from_array(source)
        if callable(least):
            least(*image.size)
    return image.convert("L" if channels == 1 else "RGB")


def _as_file(source: Any) -> Any:
    """Return what Pillow opens; None for what is not a file."""
    if isinstance(source, str) and re.match("https?://", source, re.IGNORECASE):
        return io.BytesIO(download(source))
    if isinstance(source, str | os.PathLike):
        return os.path.expanduser(source)
    if isinstance(source, bytes | bytearray | memoryview):
        return io.BytesIO(source)
    return source if hasattr(source, "read") else None


def _name(source: Any) -> str:
    """Return the name of a source for messages."""
    if isinstance(source, str | os.PathLike):
        return repr(os.fspath(source))
    if isinstance(source, bytes | bytearray | memoryview):
        return f"what these {len(source)} bytes hold"
    name = getattr(source, "name", None)
    return repr(name) if isinstance(name, str) else f"this {type(source).__name__}"


def _open(file: Any, name: str, least: Any) -> Image.Image:
    _load_plugins()
    try:
        with Image.open(file) as image:
            return _decode(image, name, least, ours=True)
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError(f"no image at {name}") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} is not an image that Pillow can read") from error
    except Exception as error:  # each of Pillow's plugins has its own
        raise ImageError(f"cannot read {name}: {error}") from error


def _decode(image: Image.Image, name: str, least: Any, *, ours: bool) -> Image.Image:
    """Return the pixels of an image that may not have been read yet, upright, with 8 bits.

    Args:
        ours: Whether the image was opened here, and may be changed.
    """
    try:
        if least is not None:
            _reduce(image, least, ours)
        deep = image.mode == "I" and image.format in _DEEP_FORMATS
        upright = _turn(image)
    except Exception as error:  # Pillow reads pixels late
        raise ImageError(f"cannot read {name}: {error}") from error
    if 0 in upright.size:
        raise ImageError(f"image of {upright.width}x{upright.height} pixels: there is nothing to classify")
    try:
        return _to_8_bit(upright, 65535 if deep else None)
    except (ValueError, OSError) as error:
        raise ImageError(f"cannot read {name}, an image of mode {upright.mode!r}: {error}") from error


def _turn(image: Image.Image) -> Image.Image:
    """Return a copy of an image that stands upright.

    `ImageOps.exif_transpose` writes all EXIF data anew, and fails where any other tag of it has a wrong type.
    """
    image.load()
    turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    if turn is None:
        return image.copy()
    turned = image.transpose(turn)
    turned.info = {key: value for key, value in turned.info.items() if key == "transparency"}  # nobody turns it again
    return turned


def _reduce(image: Image.Image, least: Size | Callable[[int, int], Size], ours: bool) -> None:
    """Let a large photograph that is not decoded yet be decoded at a smaller scale."""
    photograph = image.format in ("JPEG", "MPO")
    turned = photograph and image.getexif().get(_ORIENTATION, 1) >= 5
    size = image.size[::-1] if turned else image.size
    wanted = least(*size) if callable(least) else least
    if photograph and ours and image.width * image.height >= LARGE:
        image.draft(None, wanted[::-1] if turned else wanted)


def _to_8_bit(image: Image.Image, white: int | None) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_to_bytes(np.asarray(image), f"image of mode {image.mode!r}", white))
    if image.mode == "La":  # which Pillow converts only to LA
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB") if image.mode == "LAB" else image  # Pillow does not convert LAB to grey directly


def _to_bytes(array: npt.NDArray[Any], what: str, white: int | None = None) -> npt.NDArray[np.uint8]:
    """Convert numbers of any kind to uint8, as `read_image` says."""
    kind, bits = array.dtype.kind, 8 * array.dtype.itemsize
    if kind == "b":
        white = 1
    elif kind == "u" and bits <= 16:
        white = 2**bits - 1
    elif kind == "f" or (kind in "iu" and bits > 8):
        white = _white(array, what, white)
    else:
        raise ImageError(f"array of {array.dtype}: give uint8, uint16, bool, larger integers or floats")
    if white == 255 and kind in "iu":
        return array.astype(np.uint8)
    scaled: npt.NDArray[Any] = np.round(array.astype(np.float32) * (255 / white))
    return scaled.astype(np.uint8)


def _white(array: npt.NDArray[Any], what: str, known: int | None) -> int:
    """Return the number that stands for white in an array whose type does not say it."""
    lowest, highest = array.min(), array.max()
    if not np.isfinite([lowest, highest]).all():
        count = array.size - np.count_nonzero(np.isfinite(array))
        raise ImageError(f"{what}: {count} of {array.size} values are not finite (NaN or infinite): correct them")
    choice = [known] if known else [1, 255, 65535] if array.dtype.kind == "f" else [255, 65535]
    white = next((white for white in choice if highest <= white), None)
    is_clear = white == choice[0] or (white is not None and highest >= white / 16)
    if lowest < 0 or white is None or not is_clear:
        raise ImageError(
            f"{what} with values from {lowest} to {highest}: give values in [0, 1] as floats, or in [0, 255] or "
            "[0, 65535]. The largest must be at least a sixteenth of white, so that it is clear which is meant"
        )
    return white


def _from_array(source: Any) -> Image.Image:
    if source is None:
        raise ImageError(
            "None is not an image. cv2.imread returns None where there is no such file or where it cannot read it: "
            "check the path"
        )
    if isinstance(source, torch.Tensor):
        tensor = source.detach().cpu()
        array = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()  # NumPy has no bfloat16
    else:
        try:
            array = np.asarray(source)
        except ValueError as error:
            raise ImageError(f"{type(source).__name__} that is not an array: {error}") from error
    if isinstance(source, torch.Tensor) and array.ndim == 3 and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    fits = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if not fits or 0 in array.shape:
        raise ImageError(f"array of shape {array.shape}: give (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)")
    what = f"{'float ' if array.dtype.kind == 'f' else ''}array of {array.dtype}"
    return _to_8_bit(Image.fromarray(np.ascontiguousarray(_to_bytes(array, what))), None)


def is_one_image(source: Any) -> bool:
    """Return whether something is meant as one image, as `read_image` takes it, and not as many of them."""
    if isinstance(source, str | bytes | bytearray | memoryview | os.PathLike | Image.Image | torch.Tensor | Mapping):
        return True
    if isinstance(source, list | tuple):
        return False
    kind = getattr(getattr(source, "dtype", None), "kind", "")
    names = getattr(source, "ndim", 0) == 1 and kind in ("O", "U")  # an array of paths, or a column of a table
    return (hasattr(source, "__array__") and not names) or hasattr(source, "read") or not hasattr(source, "__iter__")
