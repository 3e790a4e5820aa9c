"""What decoding large photographs at a reduced scale saves and changes: `python benchmarks/photographs.py`.

Times `predict` on a synthetic JPEG of 12 megapixels, whole and reduced, in turns. With `--data`, a source as for
`convmixer validate`, also enlarges its test images to photographs with the noise of a sensor and compares the classes
that the model finds in them.
"""

from __future__ import annotations

import io
import statistics

import harness
import numpy as np
import torch
from PIL import Image

import convmixer
from convmixer.data.readers import open_split


def enlarge(image: Image.Image, pixels: int, random: np.random.Generator) -> bytes:
    """Return a JPEG of about that many pixels, in the same proportions, with noise of five grey levels."""
    factor = (pixels / (image.width * image.height)) ** 0.5
    size = round(image.width * factor), round(image.height * factor)
    large = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC), np.float32)
    noisy = np.clip(large + 5 * random.standard_normal(large.shape, np.float32), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noisy).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def synthetic(random: np.random.Generator) -> Image.Image:
    """Return noise at all scales, as in photographs: its power falls with the square of the frequency."""
    total = np.zeros((750, 1000, 3), np.float32)
    for octave in range(8):
        cells = random.normal(0, 60 / 2 ** (octave / 2), (3 * 2**octave, 4 * 2**octave, 3))
        layers = [Image.fromarray(layer.astype(np.float32)).resize((1000, 750)) for layer in np.moveaxis(cells, 2, 0)]
        total += np.stack([np.asarray(layer) for layer in layers], axis=2)
    return Image.fromarray(np.clip(total + 128, 0, 255).astype(np.uint8))


def compare(model: torch.nn.Module, data: str, megapixels: float, count: int | None) -> None:
    random = np.random.default_rng(0)
    right, same, change, images = {True: 0, False: 0}, 0, [], 0
    split = open_split(data, "test")
    order = np.random.default_rng(1).permutation(len(split))[:count].tolist()
    pictures: list[Image.Image] = []

    def keep(source: object) -> torch.Tensor:
        pictures.append(convmixer.data.images.read_image(source))
        return torch.empty(0)

    for number in order:
        _, label = split.read(number, keep)
        photograph = enlarge(pictures.pop(), round(megapixels * 1e6), random)
        answers = {}
        for draft in (True, False):
            answers[draft] = convmixer.predict(model, photograph, topk=model.num_classes, draft=draft)
            right[draft] += answers[draft][0][0] == split.classes[label]
        same += answers[True][0][0] == answers[False][0][0]
        exact = dict(answers[False])
        change.append(max(abs(p - exact[name]) for name, p in answers[True]))
        images += 1
    print(f"{images} test images of {data}, enlarged to {megapixels:g} megapixels with noise:")
    print(f"  top-1 whole {100 * right[False] / images:.2f} %, reduced {100 * right[True] / images:.2f} %")
    print(f"  same class for {same} of {images}; largest change of a probability of an image: median")
    print(f"  {np.median(change):.4f}, 99th percentile {np.quantile(change, 0.99):.4f}, most {max(change):.4f}")


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--model", default="convmixer_256_8.cifar10")
    parser.add_argument("--checkpoint", help="weights to use instead of the model's own")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--data", help="test images whose classes are the model's")
    parser.add_argument("--megapixels", type=float, default=12.0)
    parser.add_argument("--count", type=int, help="how many of the test images; by default all")
    options = parser.parse_args()
    model = convmixer.create_model(options.model, pretrained=True, checkpoint=options.checkpoint, device="cpu").eval()
    print(f"{options.model} on {harness.machine()}")
    random = np.random.default_rng(0)
    photograph = enlarge(synthetic(random), 12_000_000, random)
    calls = {
        "whole": lambda: convmixer.predict(model, photograph, draft=False),
        "reduced": lambda: convmixer.predict(model, photograph, draft=True),
    }
    taken = harness.take_turns(calls, options.rounds)
    medians = {name: 1000 * statistics.median(times) for name, times in taken.items()}
    for name, value in medians.items():
        print(f"predict, 12 megapixels ({len(photograph) / 1e6:.1f} MB), {name}: {value:.0f} ms")
    ratio = harness.ratio(taken["whole"], taken["reduced"])
    print(f"ratio {ratio:.2f}, median of {options.rounds} rounds")
    harness.write(options.json, {"model": options.model, "milliseconds": medians, "ratio": ratio})
    if options.data:
        compare(model, options.data, options.megapixels, options.count)


if __name__ == "__main__":
    main()
