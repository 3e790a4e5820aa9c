"""How many images a second are augmented: by `convmixer train`, torchvision and kornia.

    python benchmarks/augment.py [--images 4096] [--size 32] [--rounds 7] [--device auto] [--threads N] [--json FILE]

RandAugment(2, 9), flip, translations by at most 2 pixels with reflected borders, normalisation and random erasing, of
random images in memory. The ways take turns in each round; the median counts. kornia takes part where it is installed
(`pip install kornia`); it shifts by padding with reflection and cropping. Its RandAugment draws its two operations for
the whole batch, so that it is given batches of 128; the strength of each differs from image to image.
"""

import statistics
from collections.abc import Callable, Iterator
from functools import partial

import harness
import torch
import torch.nn.functional as F
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision.transforms import v2

from convmixer.data.memory import Images, Share
from convmixer.factory import resolve_device
from convmixer.training import Recipe, get_recipe
from convmixer.training.augment import Augment

STEP = 128  # images
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)


def ours(images: Images, recipe: Recipe) -> Iterator[Tensor]:
    config = {"input_size": tuple(images.pixels.shape[1:]), "mean": MEAN, "std": STD}
    changes = Augment(recipe, config, 10, images.pixels.device)
    share = Share(0, 0, STEP, 1, range(1), range(len(images) // STEP))
    return (part.inputs for part in changes.prepared(images, share, lambda _: 0.0))


def shift(pixels: Tensor, most: int) -> Tensor:
    count, _, height, width = pixels.shape
    padded = F.pad(pixels.float(), (most,) * 4, mode="reflect").to(pixels.dtype)
    top, left = torch.randint(2 * most + 1, (2, count, 1), device=pixels.device)
    rows, columns = (first + torch.arange(side, device=pixels.device) for first, side in ((top, height), (left, width)))
    image = torch.arange(count, device=pixels.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def torchvisions(images: Images, recipe: Recipe, *, group: int) -> Iterator[Tensor]:
    """torchvision's RandAugment with a draw for each group of images, timm's erasing."""
    changes = v2.RandAugment(*recipe.rand_augment)
    normalize = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    erase = RandomErasing(recipe.random_erasing, mode="pixel", device=str(images.pixels.device))
    for pixels in images.pixels.split(STEP):
        changed = torch.cat([changes(some) for some in pixels.split(group)])
        flipped = torch.rand(len(changed), 1, 1, 1, device=changed.device) < recipe.flip
        changed = shift(torch.where(flipped, changed.flip(3), changed), recipe.shift)
        yield erase(normalize(changed))


def kornias(images: Images, recipe: Recipe) -> Iterator[Tensor]:
    import kornia.augmentation as K
    from kornia.augmentation.auto import RandAugment

    operations, magnitude = recipe.rand_augment
    height, width = images.pixels.shape[2:]
    changes = K.AugmentationSequential(
        RandAugment(n=operations, m=magnitude),
        K.RandomHorizontalFlip(recipe.flip),
        K.RandomCrop((height, width), padding=recipe.shift, padding_mode="reflect"),
        K.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
        K.RandomErasing(p=recipe.random_erasing, scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3)),
        data_keys=["input"],
    ).to(images.pixels.device)
    for pixels in images.pixels.split(STEP):
        yield changes(pixels.float() / 255)


def exhaust(make: Callable[[], Iterator[Tensor]]) -> None:
    for inputs in make():
        assert inputs.dtype == torch.float32


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = resolve_device(options.device)
    recipe = get_recipe("cifar10", rand_augment=(2, 9), shift=2, flip=0.5, random_erasing=0.25)
    count = options.images // STEP * STEP
    pixels = torch.randint(256, (count, 3, options.size, options.size), dtype=torch.uint8, device=device)
    images = Images(pixels, torch.zeros(count, dtype=torch.int64, device=device), ("a",))
    ways: dict[str, Callable[[], Iterator[Tensor]]] = {
        "convmixer": partial(ours, images, recipe),
        "torchvision, groups of eight": partial(torchvisions, images, recipe, group=8),
        "torchvision, image by image": partial(torchvisions, images, recipe, group=1),
    }
    try:
        import kornia

        ways[f"kornia {kornia.__version__}, a draw for 128"] = partial(kornias, images, recipe)
    except ImportError:
        print("kornia is not installed: left out")
    calls = {name: partial(exhaust, make) for name, make in ways.items()}
    taken = harness.take_turns(calls, options.rounds, clock=partial(harness.seconds, device=device))
    speed = {name: round(count / statistics.median(times)) for name, times in taken.items()}
    for name, images_per_second in speed.items():
        print(f"{name:32} {images_per_second:10,} images/s")
    report = {"images": count, "size": options.size, "rounds": options.rounds, "images_per_second": speed}
    harness.write(options.json, report, device)


if __name__ == "__main__":
    main()
