"""What weights for CIFAR-10 are worth on other photographs: ten kinds of clothes; docs/transfer.md shows the results.

    python benchmarks/transfer.py [--data data/clothing-128] [--output runs/transfer] [--sizes 64] [--seeds 0 1 2]
                                  [--json FILE]
    python benchmarks/transfer.py --choose [--sizes 32]

convmixer_256_8 learns the kinds from random weights, from those for CIFAR-10 with the backbone kept as it is, and from
them with all layers. DATA holds train.tar, validation.tar and test.tar of class folders. `--choose` tries several rates
for each way, with the first seed, on the validation images; it does not see the test images. A run that was stopped
goes on, and a finished one is not repeated. FILE keeps what it has of other sizes and seeds.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import harness

from convmixer.data.memory import fitting, load_images
from convmixer.factory import open_model
from convmixer.plots import class_probabilities
from convmixer.training import get_recipe, train

EPOCHS = 10
# By way: the fields that differ from the recipe finetune.
WAYS: dict[str, dict[str, Any]] = {
    "random weights": {"model": "convmixer_256_8", "frozen": 0.0, "layer_decay": 1.0},
    "only the head": {"frozen": 1.0},
    "all layers": {},
}
# By way: the chosen rate, then the others that were tried.
RATES = {
    "random weights": (0.01, 0.02, 0.05),
    "only the head": (0.02, 0.05, 0.1),
    "all layers": (0.02, 0.01, 0.05),
}


def run(way: str, data: Path, output: Path, size: int, seed: int, rate: float) -> tuple[Path, dict[str, Any]]:
    """Train, unless that is done, and return the folder of the run and what it reached."""
    folder = output / f"{way.replace(' ', '-')}-{size}-seed-{seed}-rate-{rate:g}-epochs-{EPOCHS}"
    if not (folder / "result.json").exists():
        recipe = get_recipe("finetune", epochs=EPOCHS, input_size=(size, size), lr=rate, seed=seed, **WAYS[way])
        train(recipe, data, folder, resume=(folder / "last.pt").exists(), device="cpu")
    return folder, json.loads((folder / "result.json").read_text(encoding="utf-8"))


def answers(folder: Path, data: Path) -> tuple[tuple[str, ...], str, str]:
    """Return the classes, and the true and the predicted class of each test image, a digit for each."""
    model = open_model(str(folder), device="cpu")
    config = model.pretrained_cfg
    images = load_images(data, "test", config["input_size"], **fitting(config))
    predicted = class_probabilities(model, images.pixels).argmax(1)
    return images.classes, *("".join(map(str, labels.tolist())) for labels in (images.labels, predicted))


def choose(data: Path, output: Path, sizes: list[int], seed: int) -> None:
    """Print what each rate reaches on the validation images."""
    with tempfile.TemporaryDirectory() as hidden:
        for name in ("train.tar", "validation.tar"):
            (Path(hidden) / name).symlink_to((data / name).resolve())
        for size in sizes:
            for way, rates in RATES.items():
                for rate in rates:
                    _, found = run(way, Path(hidden), output / "choose", size, seed, rate)
                    print(f"{way}, {size} px, rate {rate:g}: {found['validation_accuracy']:.1f} %", flush=True)


def measure(data: Path, output: Path, sizes: list[int], seeds: list[int], file: Path | None) -> None:
    """Run each way and write what it reaches on the test images."""
    record = json.loads(file.read_text(encoding="utf-8")) if file and file.exists() else {"runs": []}
    for size in sizes:
        for seed in seeds:
            for way, (rate, *_) in RATES.items():
                folder, found = run(way, data, output, size, seed, rate)
                record["classes"], record["labels"], predicted = answers(folder, data)
                key = {"way": way, "size": size, "seed": seed}
                record["runs"] = [r for r in record["runs"] if {name: r[name] for name in key} != key]
                record["runs"].append(
                    {
                        **key,
                        "rate": rate,
                        "epochs": EPOCHS,
                        "validation_accuracy": found["validation_accuracy"],
                        "test_accuracy": next(iter(found["test_accuracy"].values())),
                        **{name: found[name] for name in ("train_seconds", "device", "threads", "versions")},
                        "predicted": predicted,
                    }
                )
                if file:
                    file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
                print(f"{way}, {size} px, seed {seed}: {record['runs'][-1]['test_accuracy']:.1f} %", flush=True)


parser = harness.arguments(__doc__)
parser.add_argument("--data", type=Path, default=Path("data/clothing-128"))
parser.add_argument("--output", type=Path, default=Path("runs/transfer"))
parser.add_argument("--sizes", type=int, nargs="+", default=[64])
parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
parser.add_argument("--choose", action="store_true", help="try rates on the validation images")
args = parser.parse_args()
if args.choose:
    choose(args.data, args.output, args.sizes, args.seeds[0])
else:
    measure(args.data, args.output, args.sizes, args.seeds, args.json)
