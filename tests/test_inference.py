"""Images of every kind against Pillow and closed formulas; predictions against the bare model."""

import numpy as np
import pytest
import skimage.data
import timm
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import nn

import convmixer
from convmixer.errors import ArgumentError, ImageError
from convmixer.inference import label_names, read_image
from convmixer.registry import CIFAR10_CLASSES

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def values(image):
    """Pixels as numbers that may be subtracted."""
    return np.asarray(image).astype(np.int64)


def same(image, expected, tolerance=0):
    assert image.mode == ("L" if np.ndim(expected) == 2 else "RGB")
    assert values(image).shape == np.shape(expected)
    assert np.abs(values(image) - expected).max() <= tolerance


@pytest.fixture
def arrow():
    """A small image without any symmetry."""
    image = Image.new("RGB", (9, 6), "navy")
    draw = ImageDraw.Draw(image)
    draw.line((0, 5, 7, 1), "yellow")
    draw.rectangle((6, 0, 8, 1), "red")
    image.putpixel((0, 0), (0, 255, 0))
    return image


@pytest.fixture(scope="module")
def photo():
    """A photograph, uint8 (H, W, 3)."""
    return skimage.data.astronaut()


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


@pytest.mark.parametrize("dtype", ["int8", "int32", "int64", "uint32", "complex64"])
def test_types_that_are_no_image(dtype):
    with pytest.raises(ImageError, match=f"array of {dtype}: give uint8, uint16, bool, or floats"):
        read_image(np.zeros((8, 8), dtype))


@pytest.mark.parametrize("value", [-0.01, 1.01, 255.0, float("nan"), float("inf")])
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_floats_out_of_range(value, kind):
    array = np.full((8, 8), 0.5, np.float32)
    array[3, 3] = value
    with pytest.raises(ImageError, match=r"values from .* to .*: give values in \[0, 1\]"):
        read_image(kind(array))


@pytest.mark.parametrize("source", [None, 3, b"bytes", object, {"a": 1}, [[1, 2], [3]], "a\0b"], ids=str)
def test_objects_that_are_no_image(source):
    with pytest.raises(ImageError):
        read_image(source)


@pytest.mark.parametrize("channels", [0, 2, 4])
def test_other_channel_counts(arrow, channels):
    with pytest.raises(ArgumentError, match=f"images have 1 or 3 channels, this model takes {channels}"):
        read_image(arrow, channels)


# ---- predictions ----------------------------------------------------------------------------------------------------


def small(**arguments):
    """convmixer_256_8 with fewer channels and blocks, to be quick; preprocessing and labels are the same."""
    model = convmixer.create_model("convmixer_256_8", device="cpu", dim=32, depth=2, **arguments)
    model.pretrained_cfg["label_names"] = CIFAR10_CLASSES  # as weights would bring them
    return model


def lively(model):
    """A random head with weights so large that classes are far apart."""
    torch.manual_seed(1)
    nn.init.normal_(model.head.weight, std=3)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return lively(small())


@pytest.fixture(scope="module")
def tiles(photo):
    """Nine pieces of a photograph, 32 x 32 pixels."""
    return [photo[y : y + 32, x : x + 32] for y in (50, 150, 250) for x in (100, 200, 300)]


@torch.no_grad()
def probabilities(model, tile):
    """Class probabilities of one tile by formula: normalised with CIFAR-10's figures, and softmax."""
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2471, 0.2435, 0.2616])
    x = ((torch.from_numpy(tile / 255).float() - mean) / std).permute(2, 0, 1)
    powers = model.eval()(x[None])[0].double().exp()
    return powers / powers.sum()


def close(mine, other, tolerance=1e-4):
    """The same labels in the same order, with the same probabilities."""
    assert [label for label, _ in mine] == [label for label, _ in other]
    assert [p for _, p in mine] == pytest.approx([p for _, p in other], abs=tolerance)


def test_predictions_are_those_of_the_model(model, tiles):
    for tile, prediction in zip(tiles, convmixer.predict(model, tiles, topk=10), strict=True):
        expected = probabilities(model, tile)
        assert prediction == sorted(prediction, key=lambda pair: -pair[1])
        assert {label: p for label, p in prediction} == pytest.approx(
            dict(zip(CIFAR10, expected.tolist(), strict=True)), abs=1e-4
        )
        assert sum(p for _, p in prediction) == pytest.approx(1)


def test_the_same_photograph_by_any_way(model, cat):
    with Image.open(cat) as image:
        by_pillow = convmixer.predict(model, image)
        array = np.asarray(image.convert("RGB"))
    assert len(by_pillow) == 5
    for source in (cat, str(cat), array, array / 255, torch.from_numpy(array.copy()).permute(2, 0, 1)):
        assert convmixer.predict(model, source) == by_pillow


def test_one_image_and_lists(model, tiles):
    one = convmixer.predict(model, tiles[0])
    assert all(isinstance(label, str) and isinstance(p, float) for label, p in one)
    assert convmixer.predict(model, [tiles[0]]) == [one]
    assert convmixer.predict(model, (tiles[0],)) == [one]
    assert convmixer.predict(model, []) == []


def test_topk(model, tiles):
    every = convmixer.predict(model, tiles[0], topk=10)
    assert convmixer.predict(model, tiles[0], topk=1) == every[:1]
    assert convmixer.predict(model, tiles[0], topk=3) == every[:3]
    assert convmixer.predict(model, tiles[0], topk=1000) == every
    assert sorted(label for label, _ in every) == CIFAR10


@pytest.mark.parametrize("batch_size", [1, 2, 4, 9, 100])
def test_batches_do_not_change_answers(model, tiles, batch_size):
    together = convmixer.predict(model, tiles, batch_size=batch_size)
    for tile, prediction in zip(tiles, together, strict=True):
        close(prediction, convmixer.predict(model, tile))


def test_images_of_different_sizes_share_a_batch(model, cat):
    paths = sorted(cat.parent.glob("*.png"))
    assert len(paths) >= 3
    for path, prediction in zip(paths, convmixer.predict(model, paths), strict=True):
        close(prediction, convmixer.predict(model, path))


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(tiles, training):
    model = small(drop_rate=0.9).train(training)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    first = convmixer.predict(model, tiles)
    assert convmixer.predict(model, tiles) == first  # no dropout
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    assert all(module.training is training for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    model.train()(torch.rand(2, 3, 32, 32)).sum().backward()  # still trainable


def test_the_model_is_left_as_it_was_after_an_error(model, tiles):
    model.train()
    with pytest.raises(ImageError):
        convmixer.predict(model, [tiles[0], None])
    assert model.training


def test_layers_frozen_in_evaluation_mode_stay_so(tiles):
    """Fine-tuning keeps the stem's BatchNorm statistics while the rest trains."""
    model = small().train()
    model.stem.eval()
    convmixer.predict(model, tiles[0])
    assert model.training
    assert not model.stem[2].training


def test_bfloat16(model, tiles):
    half = small(dtype=torch.bfloat16)
    half.load_state_dict(model.state_dict())
    for tile, prediction in zip(tiles, convmixer.predict(half, tiles, topk=10), strict=True):
        assert sum(p for _, p in prediction) == pytest.approx(1, abs=1e-5)
        expected = dict(zip(CIFAR10, probabilities(model, tile).tolist(), strict=True))
        assert {label: p for label, p in prediction} == pytest.approx(expected, abs=0.05)


def test_one_channel(photo):
    model = lively(small(in_chans=1))
    colour = Image.fromarray(photo[50:82, 100:132])
    prediction = convmixer.predict(model, colour, topk=10)
    assert convmixer.predict(model, ImageOps.grayscale(colour), topk=10) == prediction
    assert sum(p for _, p in prediction) == pytest.approx(1)


def test_other_channels_need_tensors(arrow):
    model = small(in_chans=5)
    with pytest.raises(ArgumentError, match="this model takes 5: call it with tensors"):
        convmixer.predict(model, arrow)


@pytest.mark.parametrize("arguments", [{"num_classes": 0}, {"features_only": True, "out_indices": (0,)}])
def test_models_without_classes(arrow, arguments):
    model = small(**arguments)
    with pytest.raises(ArgumentError, match=r"this model has no classes: build it without features_only"):
        convmixer.predict(model, arrow)


@pytest.mark.parametrize("wrong", [{"topk": 0}, {"topk": -1}, {"batch_size": 0}])
def test_senseless_counts(model, arrow, wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ArgumentError, match=f"{name}={value}: give a whole number of at least 1"):
        convmixer.predict(model, arrow, **wrong)


def test_missing_and_broken_files_are_named(model, tiles, tmp_path):
    with pytest.raises(ImageError, match=r"no image at .*none\.png"):
        convmixer.predict(model, tmp_path / "none.png")
    (tmp_path / "broken.png").write_bytes(b"broken")
    with pytest.raises(ImageError, match=r"broken\.png' is not an image"):
        convmixer.predict(model, [tiles[0], tmp_path / "broken.png"])


# ---- labels ---------------------------------------------------------------------------------------------------------


def test_labels_of_cifar10(model):
    assert list(label_names(model)) == CIFAR10


@pytest.mark.parametrize("classes", [2, 11])
def test_labels_after_a_change_of_head(classes, arrow):
    expected = [f"class {i}" for i in range(classes)]
    built = small(num_classes=classes)
    assert list(label_names(built)) == expected
    swapped = small()
    swapped.reset_classifier(classes)
    assert list(label_names(swapped)) == expected
    assert sorted(label for label, _ in convmixer.predict(swapped, arrow, topk=99)) == sorted(expected)


def test_labels_of_imagenet(cat):
    model = lively(timm.create_model("convmixer_1024_20_ks9_p14"))
    names = label_names(model)
    assert len(names) == 1000
    assert len(set(names)) == 999  # a crane is a bird and a machine
    known = {0: "tench", 7: "cock", 207: "golden retriever", 281: "tabby", 504: "coffee mug", 999: "toilet tissue"}
    for index, start in known.items():
        assert names[index].startswith(start)
    prediction = convmixer.predict(model, cat, topk=1000)
    assert sorted(label for label, _ in prediction) == sorted(names)
    assert sum(p for _, p in prediction) == pytest.approx(1, abs=1e-4)


def test_no_labels_where_nothing_says_what_the_classes_are():
    untrained = convmixer.create_model("convmixer_1024_16", device="meta")
    assert label_names(untrained)[:2] == ("class 0", "class 1")
    assert len(label_names(untrained)) == 1000
