"""Changes of whole chunks of images, against torchvision image by image, timm's draws and closed formulas."""

import functools
import math
import random

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_images
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as V

from convmixer.data.memory import Images, Share
from convmixer.errors import ArgumentError
from convmixer.training import Recipe, get_recipe
from convmixer.training import augment as aug
from convmixer.training.augment import Augment, Draws, Op, Operations, RandomNumbers, draw

# With images as small as these, threads only wait for each other.
pytestmark = pytest.mark.usefixtures("one_thread")

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
PLAIN = {"flip": 0.0, "shift": 0, "rand_augment": (0, 0)}
GEOMETRIC = {Op.SHEAR_X, Op.SHEAR_Y, Op.TRANSLATE_X, Op.TRANSLATE_Y, Op.ROTATE}
EXACT = {Op.POSTERIZE, Op.SOLARIZE, Op.AUTOCONTRAST, Op.EQUALIZE, Op.IDENTITY}
SHAPES = [(3, 32, 32), (1, 32, 32), (3, 20, 13), (3, 2, 5)]


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.lru_cache
def photographs(count: int, channels: int, height: int, width: int) -> torch.Tensor:
    """Crops of two photographs, some with equal pixels or only two values."""
    photos = [torch.tensor(image).permute(2, 0, 1) for image in load_sample_images().images]
    rng = np.random.default_rng(0)
    crops = []
    for i in range(count):
        photo, scale = photos[i % 2], int(rng.integers(1, 8))
        top, left = (
            int(rng.integers(side - scale * s)) for side, s in zip(photo.shape[1:], (height, width), strict=True)
        )
        crops.append(photo[:, top : top + scale * height : scale, left : left + scale * width : scale])
    images = torch.stack(crops)[:, :channels].clone()
    images[0] = 77
    images[1, :, ::2], images[1, :, 1::2] = 0, 255
    return images


def config(channels: int, height: int, width: int) -> dict:
    return {"input_size": (channels, height, width), "mean": MEAN[:channels], "std": STD[:channels]}


def augment(shape=(3, 32, 32), device="cpu", classes=10, **fields) -> Augment:
    return Augment(Recipe(**{**PLAIN, **fields}), config(*shape), classes, torch.device(device))


def pixels_of(x: torch.Tensor) -> torch.Tensor:
    """Normalised images as uint8."""
    mean, std = (torch.tensor(values[: x.shape[1]], device=x.device).view(-1, 1, 1) for values in (MEAN, STD))
    found = (x * std + mean) * 255
    assert (found - found.round()).abs().max() < 1e-3
    return found.round().to(torch.uint8)


def numbers(count: int, *, seed=0, epoch=0, steps=1, parts=1) -> RandomNumbers:
    share = Share(seed, epoch, count // steps, parts, range(parts), range(steps))
    return RandomNumbers(share, [(step, part) for step in range(steps) for part in range(parts)])


def torchvisions(image: torch.Tensor, op: Op, value: float, fill=(0.0, 0.0, 0.0)) -> torch.Tensor:
    """What torchvision's function makes of one image, by the calls of its RandAugment and ColorJitter."""
    fill = list(fill[: len(image)])
    how = {"scale": 1.0, "fill": fill, "angle": 0.0}
    shear = math.degrees(math.atan(value))
    calls = {
        Op.IDENTITY: lambda: image,
        Op.SHEAR_X: lambda: V.affine(image, translate=[0, 0], shear=[shear, 0.0], center=[0, 0], **how),
        Op.SHEAR_Y: lambda: V.affine(image, translate=[0, 0], shear=[0.0, shear], center=[0, 0], **how),
        Op.TRANSLATE_X: lambda: V.affine(image, translate=[int(value), 0], shear=[0.0, 0.0], **how),
        Op.TRANSLATE_Y: lambda: V.affine(image, translate=[0, int(value)], shear=[0.0, 0.0], **how),
        Op.ROTATE: lambda: V.rotate(image, value, fill=fill),
        Op.BRIGHTNESS: lambda: V.adjust_brightness(image, value),
        Op.COLOR: lambda: V.adjust_saturation(image, value),
        Op.CONTRAST: lambda: V.adjust_contrast(image, value),
        Op.SHARPNESS: lambda: V.adjust_sharpness(image, value),
        Op.POSTERIZE: lambda: V.posterize(image, int(value)),
        Op.SOLARIZE: lambda: V.solarize(image, 255.0 * value),
        Op.AUTOCONTRAST: lambda: V.autocontrast(image),
        Op.EQUALIZE: lambda: V.equalize(image),
        Op.HUE: lambda: V.adjust_hue(image, value),
    }
    return calls[op]()


def _values(op: Op, height: int, width: int) -> list[float]:
    """All that RandAugment and TrivialAugmentWide may ask of an operation, by torchvision's own tables."""
    if op == Op.HUE:
        return np.linspace(-0.5, 0.5, 41).tolist()
    name = "".join(word.capitalize() for word in op.name.split("_")).replace("Autocontrast", "AutoContrast")
    found = []
    for kind in (v2.RandAugment, v2.TrivialAugmentWide):
        make, signed = kind._AUGMENTATION_SPACE[name]
        table = make(31, height, width)
        values = [0.0] if table is None else table.tolist()
        found += values + ([-value for value in values] if signed else [])
    if op in (Op.TRANSLATE_X, Op.TRANSLATE_Y):
        found = [float(int(value)) for value in found]
    return [1 + value for value in found] if Op.BRIGHTNESS <= op <= Op.SHARPNESS else found


def _undecided(op: Op, value: float, height: int, width: int) -> torch.Tensor:
    """Pixels (H, W) whose place lies between two pixels, where rounding decides: by the inverse map in float64."""
    rows, columns = (torch.arange(side, dtype=torch.float64) - (side - 1) / 2 for side in (height, width))
    rows, columns = rows[:, None], columns[None]
    row, column = rows.expand(height, width), columns.expand(height, width)
    if op == Op.SHEAR_X:
        column = column + value * (rows + height / 2)
    if op == Op.SHEAR_Y:
        row = row + value * (columns + width / 2)
    if op == Op.ROTATE:
        turn = math.radians(value)
        row, column = math.sin(turn) * columns + math.cos(turn) * rows, math.cos(turn) * columns - math.sin(turn) * rows
    places = (row + (height - 1) / 2, column + (width - 1) / 2)
    return torch.stack([(place - place.floor() - 0.5).abs() < 1e-4 for place in places]).any(0)


# ---- operations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op", Op)
def test_each_operation_is_torchvisions(op, shape):
    values = _values(op, *shape[1:])
    images = photographs(max(24, len(values)), *shape)
    op_of, value_of = np.full(len(images), int(op)), np.resize(values, len(images))
    found = pixels_of(augment(shape, fill="mean")(images, Draws(operations=[Operations(op_of, value_of)])))
    fill = [round(255 * mean) for mean in MEAN]
    for image, value, result in zip(images, value_of.tolist(), found, strict=True):
        expected = torchvisions(image, op, value, fill)
        if op in GEOMETRIC:
            decided = ~_undecided(op, value, *shape[1:])
            assert decided.float().mean() > 0.4 or abs(value) == 90
            assert torch.equal(result[:, decided], expected[:, decided])
        elif op in EXACT:
            assert torch.equal(result, expected)
        else:
            assert (result.int() - expected.int()).abs().max() <= 1


def test_gaps_are_black_or_of_the_mean_colour():
    images = photographs(8, 3, 8, 8)
    draws = Draws(operations=[Operations(np.full(8, int(Op.TRANSLATE_X)), np.full(8, 3.0))])
    for fill, expected in (("black", [0, 0, 0]), ("mean", [round(255 * mean) for mean in MEAN])):
        found = pixels_of(augment((3, 8, 8), fill=fill)(images, draws))
        assert (found[:, :, :, :3] == torch.tensor(expected).view(3, 1, 1)).all()
        assert torch.equal(found[:, :, :, 3:], images[:, :, :, :5])


@pytest.mark.parametrize("fields", [{"rand_augment": (2, 9)}, {"rand_augment": (3, 30)}, {"trivial_augment": True}])
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_operations_follow_each_other_for_each_image_as_drawn(fields, shape):
    images = photographs(150, *shape)
    changes = augment(shape, **fields)
    draws = draw(changes.recipe, numbers(150), shape[1:], shape[1:], mixing=False)
    found = pixels_of(changes(images, draws))
    off = []
    for i, image in enumerate(images):
        expected = image
        for op, value in draws.operations:
            expected = torchvisions(expected, Op(op[i]), float(value[i]))
        off.append((found[i].int() - expected.int()).abs().max() > 1)
    # A level of difference may become more in the next operation, and a few shears lie between pixels.
    assert np.mean(off) < 0.1
    assert len(draws.operations) == (1 if "trivial_augment" in fields else fields["rand_augment"][0])


def test_colour_jitter_is_torchvisions():
    images = photographs(200, 3, 16, 16)
    draws = draw(augment(color_jitter=0.3).recipe, numbers(200), (16, 16), (16, 16), mixing=False)
    found = pixels_of(augment((3, 16, 16))(images, draws))
    orders = {tuple(int(op[i]) for op, _ in draws.operations) for i in range(200)}
    assert len(orders) == 24
    assert {frozenset(order) for order in orders} == {frozenset((Op.BRIGHTNESS, Op.CONTRAST, Op.COLOR, Op.HUE))}
    difference = []
    for i, image in enumerate(images):
        expected = image
        for op, value in draws.operations:
            expected = torchvisions(expected, Op(op[i]), float(value[i]))
        difference.append((found[i].int() - expected.int()).abs())
    assert torch.stack(difference).float().mean() < 0.05
    assert torch.stack(difference).max() <= 6  # a level of difference, four times


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_crops_are_torchvisions(shape):
    images = photographs(100, *shape)
    boxes = aug.draw_crops(numbers(100), 0.1, *shape[1:])
    found = pixels_of(augment(shape)(images, Draws(crops=boxes)))
    for image, box, result in zip(images, boxes.T.tolist(), found, strict=True):
        expected = V.resized_crop(image, *box, size=list(shape[1:]), antialias=True)
        assert (result.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_flips_and_shifts(shape):
    images, most = photographs(100, *shape), 3
    changes = augment(shape, flip=0.5, vertical_flip=0.5, shift=most, rand_augment=(1, 9))
    draws = draw(changes.recipe, numbers(100), shape[1:], shape[1:], mixing=False)
    before = pixels_of(changes(images, Draws(operations=draws.operations)))
    found = pixels_of(changes(images, draws))
    for i, (image, result) in enumerate(zip(before, found, strict=True)):
        image = V.horizontal_flip(image) if draws.flips[i] else image
        image = V.vertical_flip(image) if draws.vertical_flips[i] else image
        padded = V.pad(image, [most], padding_mode="reflect")
        down, right = (draws.shifts[:, i] + most).tolist()
        assert torch.equal(result, padded[:, down : down + shape[1], right : right + shape[2]])
    seen = {tuple(shift) for shift in draws.shifts.T.tolist()}
    assert seen <= {(i, j) for i in range(-most, most + 1) for j in range(-most, most + 1)}
    assert len(seen) > 30


def test_no_change_only_normalises():
    images = photographs(16, 3, 9, 9)
    expected = (images / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    assert torch.allclose(augment((3, 9, 9))(images, Draws()), expected, atol=1e-6)


@pytest.mark.parametrize(("shape", "size", "expected"), [((3, 16, 16), 6, (6, 6)), ((1, 20, 13), 10, (15, 10))])
def test_smaller_images_are_torchvisions(shape, size, expected):
    images = photographs(8, *shape)
    found = pixels_of(augment(shape)(images, Draws(), size))
    assert torch.equal(found, V.resize(images, list(expected), antialias=True))


def test_shifts_beyond_the_image_are_refused():
    text = r"shift=8: images of 8x9 pixels, reflected at their borders, move by at most 7: give less"
    with pytest.raises(ArgumentError, match=text):
        augment((3, 8, 9), shift=8)


# ---- draws ----------------------------------------------------------------------------------------------------------


def _uniform(values: np.ndarray, low: float, high: float) -> None:
    """Kolmogorov and Smirnov's test; the bound is passed by chance once in 10 million times."""
    ranks = np.arange(1, len(values) + 1) / len(values)
    assert np.abs(np.sort((values - low) / (high - low)) - ranks).max() < 2.9 / math.sqrt(len(values))


def _share_of(found: np.ndarray, expected: float) -> None:
    """Of a yes or no, within five standard deviations."""
    assert abs(found.mean() - expected) < 5 * math.sqrt(expected * (1 - expected) / found.size) + 1e-12


def test_randaugment_draws_every_operation_alike_and_both_signs():
    op, value = aug.draw_operations(numbers(70_000), 9, 32, 32)
    for kind in list(Op)[:14]:
        _share_of(op == kind, 1 / 14)
        if Op.SHEAR_X <= kind <= Op.SHARPNESS:
            middle = 1 if kind >= Op.BRIGHTNESS else 0
            assert len(np.unique(value[op == kind])) == 2
            _share_of(value[op == kind] < middle, 0.5)
    assert set(np.unique(value[op == Op.TRANSLATE_X])) == {-4, 4}  # 150 / 331 * 32 * 9 / 30 = 4.35


def test_trivialaugment_draws_every_level_alike():
    op, value = aug.draw_operations(numbers(140_000), None, 32, 32)
    _share_of(op == Op.ROTATE, 1 / 14)
    turns = value[op == Op.ROTATE]
    assert np.unique(np.abs(turns).round(3)).tolist() == pytest.approx([135 * i / 30 for i in range(31)])
    for level in range(1, 31):
        _share_of(np.isclose(np.abs(turns), 4.5 * level, atol=1e-3), 1 / 31)


def test_tables_are_torchvisions():
    for wide, kind in ((False, v2.RandAugment), (True, v2.TrivialAugmentWide)):
        table = aug.magnitudes(wide, 20, 13)
        for row, (make, _) in zip(table, kind._AUGMENTATION_SPACE.values(), strict=True):
            expected = make(31, 20, 13)
            assert np.array_equal(row, np.zeros(31) if expected is None else expected.double().numpy())


def test_jitter_factors_are_uniform():
    operations = aug.draw_jitter(numbers(20_000), 0.6)
    by_op = {
        op: np.concatenate([value[kinds == op] for kinds, value in operations]) for op in np.unique(operations[0].op)
    }
    for op in (Op.BRIGHTNESS, Op.CONTRAST, Op.COLOR):
        _uniform(by_op[op], 0.4, 1.6)
    _uniform(by_op[Op.HUE], -0.5, 0.5)
    assert aug.draw_jitter(numbers(1000), 2.0)[0].value.min() > -0.51  # no negative factors of the others
    for kinds, _ in operations:
        for op in by_op:
            _share_of(kinds == op, 0.25)


def test_crops_have_uniform_areas_and_ratios():
    top, left, height, width = aug.draw_crops(numbers(40_000), 0.2, 500, 500)
    areas = height * width / 250_000
    small = areas < 0.36  # of these all ratios fit
    _uniform(areas[small], 0.2, 0.36)
    _uniform(np.log(width / height)[small], math.log(3 / 4), math.log(4 / 3))
    _uniform((top + np.random.default_rng(0).random(40_000)) / (501 - height), 0, 1)
    _uniform((left + np.random.default_rng(1).random(40_000)) / (501 - width), 0, 1)


def test_crops_that_never_fit_are_central():
    """Of an image much wider than high, as torchvision's."""
    box = aug.draw_crops(numbers(50), 0.9, 10, 100)
    assert np.array_equal(box, np.tile([[0], [43], [10], [13]], 50))


def test_erasing_draws_what_timm_draws():
    theirs, count = RandomErasing(0.25, mode="const", device="cpu"), 20_000
    torch.manual_seed(0)
    random.seed(0)
    erased = theirs(torch.ones(count, 1, 16, 12)) == 0
    rows, columns = erased.any(3).sum(2)[:, 0].numpy(), erased.any(2).sum(2)[:, 0].numpy()
    found = aug.draw_erasing(numbers(count), 0.25, 16, 12)
    assert np.array_equal(found.image, np.unique(found.image))
    _share_of(np.isin(np.arange(count), found.image), 0.25)
    for ours, timms in ((found.box[2], rows[rows > 0]), (found.box[3], columns[columns > 0])):
        counts = [np.bincount(lengths, minlength=17) / len(lengths) for lengths in (ours, timms)]
        assert np.abs(counts[0] - counts[1]).max() < 0.02
    assert ((found.box[0] + found.box[2] <= 16) & (found.box[1] + found.box[3] <= 12)).all()


def test_erased_rectangles_are_noise():
    images = photographs(400, 3, 16, 12)
    changes = augment((3, 16, 12), random_erasing=0.5)
    source = Images(images, torch.zeros(400, dtype=torch.int64), ("a",))
    share = Share(0, 0, 400, 1, range(1), range(1))
    (part,) = changes.prepared(source, share, lambda _: 0.0)
    erasing = aug.draw_erasing(numbers(400), 0.5, 16, 12)
    order = next(share.index(400))
    plain = changes(images[order], Draws())
    noise = []
    changed = torch.zeros(400, 16, 12, dtype=torch.bool)
    for image, (top, left, height, width) in zip(erasing.image, erasing.box.T.tolist(), strict=True):
        changed[image, top : top + height, left : left + width] = True
        noise.append(part.inputs[image, :, top : top + height, left : left + width].flatten())
    assert torch.equal((part.inputs != plain).any(1), changed)
    joined = torch.cat(noise)
    assert abs(joined.mean()) < 0.02
    assert abs(joined.std() - 1) < 0.02
    assert len(joined.unique()) > 0.9 * len(joined)


# ---- mixing ---------------------------------------------------------------------------------------------------------


def _parts(fields, *, count=512, batch=64, parts=1, own=None, start=0, chunk=None, shape=(3, 12, 10), classes=7):
    """What an epoch of images of `classes` classes becomes."""
    images = Images(photographs(count, *shape), torch.arange(count) % classes, ("a",) * classes)
    if chunk:
        images.__class__ = type("Slow", (Images,), {"at_once": chunk})
    recipe = get_recipe("cifar10", **{**PLAIN, "batch_size": batch, **fields})
    changes = Augment(recipe, config(*shape), classes, torch.device("cpu"))
    steps = count // batch
    share = Share(5, 2, batch, parts, own or range(parts), range(start, steps))
    return list(changes.prepared(images, share, lambda step: step / steps)), images, share


@pytest.mark.parametrize("fields", [{"mixup": 0.4}, {"cutmix": 0.7}, {"mixup": 0.4, "cutmix": 0.7, "mix_prob": 0.5}])
def test_mixed_images_are_what_their_targets_say(fields):
    found, images, share = _parts(fields)
    recipe = get_recipe("cifar10", **fields)
    kinds = set()
    for step, (part, index) in enumerate(zip(found, share.index(len(images)), strict=True)):
        weights, cut, boxes = aug.draw_mixing(RandomNumbers(share, [(step, 0)]), recipe, 12, 10)
        assert torch.equal(part.labels, images.labels[index])
        assert torch.allclose(part.targets.sum(1), torch.ones(64))
        plain = augment((3, 12, 10))(images.pixels[index], Draws())
        for i in range(64):
            expected, weight = plain[i].clone(), float(weights[i])
            if cut[i]:
                top, left, height, width = boxes[:, i]
                place = (slice(None), slice(top, top + height), slice(left, left + width))
                expected[place] = plain[63 - i][place]
                assert weight == pytest.approx(1 - height * width / 120)
            else:
                expected = expected * weight + plain[63 - i] * (1 - weight)
            kinds.add("cut" if cut[i] else "blended" if weight < 1 else "kept")
            assert torch.allclose(part.inputs[i], expected, atol=1e-5)
            shares = torch.zeros(7)
            shares[part.labels[i]] += weight
            shares[part.labels[63 - i]] += 1 - weight
            assert torch.allclose(part.targets[i], shares, atol=1e-6)
    assert ("cut" in kinds, "blended" in kinds) == ("cutmix" in fields, "mixup" in fields)
    assert ("kept" in kinds) == ("mix_prob" in fields)


def test_mixing_draws():
    recipe = get_recipe("cifar10", mixup=0.3, cutmix=2.0, mix_prob=0.6)
    weight, cut, box = aug.draw_mixing(numbers(60_000), recipe, 100, 80)
    _share_of(cut, 0.3)
    _share_of((weight < 1) & ~cut, 0.3)
    blended = weight[(weight < 1) & ~cut]
    assert blended.mean() == pytest.approx(0.5, abs=0.02)
    assert blended.var() == pytest.approx(1 / (4 * (2 * 0.3 + 1)), rel=0.03)  # of Beta(a, a)
    top, left, height, width = box[:, cut]
    assert np.allclose(weight[cut], 1 - height * width / 8000)
    assert ((top >= 0) & (left >= 0) & (top + height <= 100) & (left + width <= 80)).all()
    whole = (top > 0) & (left > 0) & (top + height < 100) & (left + width < 80)
    assert np.abs(height / 100 - width / 80)[whole].max() < 0.011 + 1 / 80  # boxes have the shape of the image
    # E[1 - weight] before the box is cut off at the border is 0.5, and it only loses.
    assert 0.3 < (1 - weight[cut]).mean() < 0.5


def test_mixing_ends_at_its_part_of_the_run():
    found, *_ = _parts({"mixup": 0.5, "mix_until": 0.5})
    assert [part.targets.ndim for part in found] == [2, 2, 2, 2, 1, 1, 1, 1]
    assert all(torch.equal(part.targets, part.labels) for part in found[4:])
    assert all((part.targets.amax(1) < 1).any() for part in found[:4])


# ---- the same whatever the chunk and the share -----------------------------------------------------------------------

EVERYTHING = {
    "crop_scale": 0.5, "rand_augment": (2, 9), "color_jitter": 0.3, "flip": 0.5, "vertical_flip": 0.2, "shift": 2,
    "random_erasing": 0.5, "image_sizes": ((0.0, 8), (0.4, 10)),
}  # fmt: skip
MIXED = {**EVERYTHING, "mixup": 0.5, "cutmix": 1.0, "mix_prob": 0.7, "mix_until": 0.6}


def _assert_same(a, b) -> None:
    assert len(a) == len(b)
    for one, two in zip(a, b, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one, two, strict=True))


@pytest.mark.parametrize("chunk", [1, 3])
def test_chunks_and_threads_make_no_difference(chunk):
    whole = _parts(MIXED)[0]
    torch.set_num_threads(3)
    _assert_same(whole, _parts(MIXED, chunk=chunk)[0])


@pytest.mark.parametrize("start", [1, 4, 7])
def test_an_epoch_goes_on_where_it_was_left(start):
    _assert_same(_parts(MIXED)[0][start:], _parts(MIXED, start=start)[0])


def test_processes_and_parts_of_a_step_make_no_difference():
    whole = _parts(EVERYTHING)[0]
    parts = _parts(EVERYTHING, parts=4)[0]
    joined = [type(whole[0])(*map(torch.cat, zip(*parts[i : i + 4], strict=True))) for i in range(0, 32, 4)]
    _assert_same(whole, joined)
    mixed = _parts(MIXED, parts=4)[0]  # images are mixed within a part
    for process in range(2):
        mine = _parts(MIXED, parts=4, own=range(2 * process, 2 * process + 2))[0]
        _assert_same(mine, [part for i, part in enumerate(mixed) if i % 4 // 2 == process])


def test_epochs_and_seeds_differ():
    drawn = [aug.draw_operations(numbers(100, **kinds), 9, 32, 32).op for kinds in ({}, {"seed": 1}, {"epoch": 1})]
    assert not any(np.array_equal(a, b) for a, b in ((drawn[0], drawn[1]), (drawn[0], drawn[2]), (drawn[1], drawn[2])))
    two = numbers(100, steps=2).uniform(1)[0]
    assert not np.array_equal(two[:50], two[50:])


def test_image_sizes_follow_the_run():
    assert [part.inputs.shape[2:] for part in _parts(MIXED)[0]] == [(10, 8)] * 4 + [(12, 10)] * 4


def test_nothing_waits_for_the_device():
    """On the device "meta" there are shapes and no values, so that whatever asks for a value is an error."""
    changes = augment((3, 12, 10), "meta", **{**MIXED, "image_sizes": ()})
    images = torch.empty(256, 3, 12, 10, dtype=torch.uint8, device="meta")
    labels = torch.empty(256, dtype=torch.int64, device="meta")
    changes.noise = torch.empty(2**20 + 360, device="meta")
    draws = draw(changes.recipe, numbers(256), (12, 10), (12, 10), mixing=True)
    for part in changes.parts([(images[:128], labels[:128]), (images[128:], labels[128:])], draws, None):
        assert (part.inputs.shape, part.targets.shape) == ((128, 3, 12, 10), (128, 10))
    assert set(np.unique([op for op, _ in draws.operations])) == set(map(int, Op))


@pytest.mark.gpu
def test_a_gpu_computes_the_same_and_is_not_waited_for():
    images = photographs(1024, 3, 32, 32)
    labels = torch.arange(1024) % 10
    fields = {**MIXED, "image_sizes": ()}
    cpu, gpu = (augment(device=device, **fields) for device in ("cpu", "cuda"))
    draws = draw(cpu.recipe, numbers(1024), (32, 32), (32, 32), mixing=True)
    cpu.noise = torch.randn(2**20 + 3072)
    gpu.noise = cpu.noise.cuda()
    (expected,) = cpu.parts([(images, labels)], draws, None)
    batch = (images.cuda(), labels.cuda())
    next(gpu.parts([batch], draws, None))  # first calls load their kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        (found,) = gpu.parts([batch], draws, None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found.targets.cpu(), expected.targets)
    difference = (found.inputs.cpu() - expected.inputs).abs().amax((1, 2, 3))
    assert (difference < 1e-5).float().mean() > 0.9  # rounding apart may be more after the next operation


def test_images_larger_than_the_input_are_erased():
    recipe = get_recipe("cifar10", random_erasing=1.0, image_sizes=((0.0, 64),), rand_augment=(0, 0), batch_size=64)
    changes = Augment(
        recipe, {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}, 10, torch.device("cpu")
    )

    class Still:
        at_once = 1

        def parts(self, share):
            for _ in range(8):
                yield torch.zeros(64, 3, 32, 32, dtype=torch.uint8), torch.zeros(64, dtype=torch.int64)

    share = Share(0, 0, 64, 1, range(1), range(8))
    parts = list(changes.prepared(Still(), share, lambda step: 0.0))
    assert [part.inputs.shape for part in parts] == [(64, 3, 64, 64)] * 8
    assert all((part.inputs != -1).flatten(1).any(1).all() for part in parts)
