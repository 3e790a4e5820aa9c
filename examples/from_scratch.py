"""Train a ConvMixer from scratch on handwritten digits, look at it, and fine-tune the shipped weights to them.

pip install -e ".[train]" scikit-learn && python examples/from_scratch.py [--epochs 6] [--output FOLDER]
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

import convmixer
from convmixer import plots
from convmixer.data.memory import fitting, load_images
from convmixer.evaluation import validate
from convmixer.training import get_recipe, train

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=6)
parser.add_argument("--output", type=Path, default=Path(tempfile.mkdtemp(prefix="convmixer-")))
arguments = parser.parse_args()

# scikit-learn's 1,797 digits as a folder of classes: every fourth image is for the test.
data = arguments.output / "digits"
bunch = load_digits()
for i, (pixels, label) in enumerate(zip(bunch.images, bunch.target, strict=True)):
    folder = data / ("test" if i % 4 == 0 else "train") / str(label)
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray((pixels * 255 / 16).astype(np.uint8)).save(folder / f"{i:04}.png")

# Grey images of 16x16 pixels; a mirrored digit is another sign, so nothing is flipped.
common = {"in_chans": 1, "input_size": (16, 16), "image_sizes": (), "flip": 0.0, "shift": 1, "epochs": arguments.epochs}

scratch = get_recipe("cifar10-cpu", model="convmixer_128_8_ks7_p2", **common)
result = train(scratch, data, arguments.output / "scratch", device="cpu")

figures = arguments.output / "figures"
figures.mkdir(exist_ok=True)
images = load_images(data, "test", (1, 16, 16), **fitting(result.model.pretrained_cfg))
probabilities = plots.class_probabilities(result.model, images.pixels)
plots.write_figure(plots.plot_history(result.history), figures / "history.png")
plots.write_figure(
    plots.plot_mistakes(images.pixels, images.labels, probabilities, images.classes), figures / "mistakes.png"
)

tuned = train(get_recipe("finetune", **common), data, arguments.output / "tuned", device="cpu")

for name, model in {"from scratch": result.model, "fine-tuned": tuned.model}.items():
    found = validate(model, data)
    print(f"{name}: top-1 {found.top1:.1f} % of {found.count}, calibration error {found.calibration_error:.1f} %")

# The weights file knows its classes and sizes.
model = convmixer.create_model("convmixer_256_8", checkpoint=tuned.weights)
print(f"{figures} holds the figures")
print(convmixer.predict(model, sorted((data / "test" / "7").iterdir())[0], topk=3))
