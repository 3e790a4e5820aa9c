"""Find handwritten digits on photographs: a U-Net and a RetinaNet, on ConvMixer and on ResNet-18.

pip install 'convmixer[dense]' scikit-image scikit-learn matplotlib && python examples/dense_digits.py

The digits are scikit-learn's, in random colours, sizes and places on crops of scikit-image's photographs, so masks and
boxes are known exactly. Digits and photographs of the test are others than those of the training.
"""

import argparse
import csv
from collections import OrderedDict
from functools import cache, partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import segmentation_models_pytorch as smp
import skimage.data
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchmetrics.classification import MulticlassJaccardIndex
from torchmetrics.detection import MeanAveragePrecision
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import FeaturePyramidNetwork

import convmixer
from convmixer.segmentation import register_encoders

SIDE, BATCH, CHANNELS, REDUCTIONS = 64, 8, 64, (4, 8, 16)
BLOCKS = {"masks": 3, "boxes": 4}  # the last block that is used: with it both networks cost what they cost on ResNet-18
PHOTOGRAPHS = {"train": ("astronaut", "chelsea", "rocket", "gravel", "grass"), "test": ("coffee", "camera")}
BACKBONES = {
    "ConvMixer, CIFAR-10 weights": "convmixer_128_8_ks7_p2.cifar10",
    "ConvMixer, random weights": "convmixer_128_8_ks7_p2",
    "ResNet-18, random weights": "resnet18",
}
HEADS = {"masks": "U-Net", "boxes": "RetinaNet"}
MEAN, STD = (convmixer.model_info("convmixer_128_8_ks7_p2").preprocessing[name] for name in ("mean", "std"))

digits = load_digits()
TRAIN, TEST = train_test_split(np.arange(len(digits.target)), test_size=0.25, random_state=0)
DIGITS = {"train": TRAIN, "test": TEST}


# ---- scenes ---------------------------------------------------------------------------------------------------------


def scenes(split: str, count: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor, list[dict]]:
    """Draw images (count, 3, 64, 64) from 0 to 1, masks (count, 64, 64) of 0 and 1, and boxes."""
    drawn = [_scene(split, rng) for _ in range(count)]
    images, masks, targets = zip(*drawn, strict=True)
    return torch.stack(images), torch.stack(masks), list(targets)


@cache
def _photograph(name: str) -> Image.Image:
    return Image.fromarray(getattr(skimage.data, name)()).convert("RGB")


def _scene(split: str, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor, dict]:
    photo = _photograph(rng.choice(PHOTOGRAPHS[split]))
    crop = int(rng.integers(SIDE, 3 * SIDE))
    left, top = (int(rng.integers(side - crop)) for side in photo.size)
    image = np.asarray(photo.resize((SIDE, SIDE), box=(left, top, left + crop, top + crop))) / 255
    mask = np.zeros((SIDE, SIDE), np.int64)
    boxes = []
    for index in rng.choice(DIGITS[split], size=rng.integers(1, 5)):
        side = int(rng.integers(20, 33))
        digit = Image.fromarray((digits.images[index] * 15).astype(np.uint8))
        ink = np.asarray(digit.resize((side, side), Image.Resampling.BILINEAR))[..., None] / 255
        y, x = rng.integers(SIDE - side, size=2)
        here = slice(y, y + side), slice(x, x + side)
        if mask[here].any():
            continue  # digits do not overlap
        dark = image[here].mean() < 0.5
        image[here] = (1 - ink) * image[here] + ink * rng.uniform(0.7 * dark, 0.3 + 0.7 * dark, size=3)
        rows, columns = np.nonzero(ink[..., 0] > 0.4)
        mask[here][rows, columns] = 1
        boxes.append((x + columns.min(), y + rows.min(), x + columns.max() + 1, y + rows.max() + 1))
    target = {"boxes": torch.tensor(np.array(boxes), dtype=torch.float32), "labels": torch.zeros(len(boxes), dtype=int)}
    return torch.tensor(image, dtype=torch.float32).permute(2, 0, 1), torch.tensor(mask), target


def normalise(images: torch.Tensor) -> torch.Tensor:
    return (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


# ---- models ---------------------------------------------------------------------------------------------------------


def make_unet(backbone: str) -> nn.Module:
    return smp.Unet(backbone, encoder_weights=None, classes=2, decoder_channels=(64, 48, 32, 24, 16))


class ResNetFPN(nn.Module):
    """timm's ResNet-18 and torchvision's top-down pyramid, as detectors usually have them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = timm.create_model("resnet18", features_only=True, out_indices=(1, 2, 3))
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), CHANNELS)
        self.out_channels = CHANNELS

    def forward(self, x: torch.Tensor) -> OrderedDict:
        return self.fpn(OrderedDict((str(i), y) for i, y in enumerate(self.body(x))))


def make_detector(backbone: str) -> nn.Module:
    if backbone == "resnet18":
        pyramid = ResNetFPN()
    else:
        options = {"pyramid": REDUCTIONS, "pyramid_channels": CHANNELS, "return_dict": True, "device": "cpu"}
        options["out_indices"] = (BLOCKS["boxes"],)
        pyramid = convmixer.create_model(backbone, pretrained="." in backbone, **options)
    anchors = AnchorGenerator(((14, 17), (20, 24), (28, 33)), ((1.0, 1.6),) * 3)
    head = RetinaNetHead(CHANNELS, 4, num_classes=1, norm_layer=partial(nn.GroupNorm, 16))
    size = {"min_size": SIDE, "max_size": SIDE, "image_mean": MEAN, "image_std": STD}
    return RetinaNet(pyramid, 1, anchor_generator=anchors, head=head, detections_per_img=10, **size)


# ---- training and evaluation ----------------------------------------------------------------------------------------


def unet_loss(model: nn.Module, images: torch.Tensor, masks: torch.Tensor, targets: list[dict]) -> torch.Tensor:
    weight = torch.tensor([0.2, 1.0])  # most pixels are background
    return F.cross_entropy(model(normalise(images)), masks, weight)


def detector_loss(model: nn.Module, images: torch.Tensor, masks: torch.Tensor, targets: list[dict]) -> torch.Tensor:
    return sum(model(list(images), targets).values())


def train(model: nn.Module, loss_of, steps: int) -> None:
    """Train on new scenes in each step."""
    rng = np.random.default_rng(0)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    for module in model.modules():
        if isinstance(module, convmixer.FeaturePyramid):
            module.set_fused("auto")
    for step in range(steps):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model.train(), *scenes("train", BATCH, rng))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"    step {step}: loss {loss.item():.3f}", flush=True)


@torch.inference_mode()
def find(model: nn.Module, images: torch.Tensor, task: str) -> list:
    """Masks of a U-Net or boxes of a detector, image by image."""
    found: list = []
    for batch in images.split(BATCH):
        found += list(model(normalise(batch)).argmax(1)) if task == "masks" else model(list(batch))
    return found


def score(found: list, masks: torch.Tensor, targets: list[dict], task: str) -> str:
    if task == "masks":
        metric = MulticlassJaccardIndex(num_classes=2, average="macro")  # the mean IoU of background and digits
        return f"mean IoU {metric(torch.stack(found), masks).item():.3f}"
    metric = MeanAveragePrecision()
    metric.update(found, targets)
    result = metric.compute()
    return f"mAP {result['map'].item():.3f}, at IoU 0.5 {result['map_50'].item():.3f}"


@torch.inference_mode()
def count_macs(model: nn.Module, task: str) -> int:
    """Multiply-accumulates for one image."""
    image = torch.zeros(3, SIDE, SIDE)
    with FlopCounterMode(display=False) as counter:
        model.eval()(image[None] if task == "masks" else [image])
    return counter.get_total_flops() // 2


# ---- picture --------------------------------------------------------------------------------------------------------


def draw(path: Path, images: torch.Tensor, masks: list, boxes: list) -> None:
    """Scenes of the test, the masks of the U-Net and the boxes of the detector."""
    figure, axes = plt.subplots(3, len(images), figsize=(1.6 * len(images), 4.8), layout="constrained")
    for column, image in zip(axes.T, images, strict=True):
        for axis in column:
            axis.imshow(image.permute(1, 2, 0).numpy())
            axis.axis("off")
    for axis, mask in zip(axes[1], masks, strict=True):
        axis.imshow(np.ma.masked_equal(mask.numpy(), 0), cmap="tab10", vmin=0, vmax=9, interpolation="nearest")
    for axis, found in zip(axes[2], boxes, strict=True):
        sure = found["scores"] > 0.4
        for left, top, right, bottom in found["boxes"][sure].tolist():
            axis.add_patch(plt.Rectangle((left, top), right - left, bottom - top, fill=False, color="C1", lw=1.5))
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=120, help="training steps of each model, of 8 scenes")
    parser.add_argument("--scenes", type=int, default=128, help="scenes of the test")
    parser.add_argument("--backbones", nargs="+", default=list(BACKBONES.values()), choices=list(BACKBONES.values()))
    parser.add_argument("--output", type=Path, default=Path("dense"), help="folder for results.csv and dense.png")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    register_encoders(channels=CHANNELS, block=BLOCKS["masks"])
    images, masks, targets = scenes("test", args.scenes, np.random.default_rng(1))
    tasks = {"masks": (make_unet, unet_loss), "boxes": (make_detector, detector_loss)}
    rows = []
    for title, backbone in BACKBONES.items():
        found: dict[str, list] = {}
        for task, (make, loss_of) in tasks.items() if backbone in args.backbones else ():
            torch.manual_seed(0)
            model = make(backbone)
            parameters = sum(p.numel() for p in model.parameters())
            rows.append([title, HEADS[task], f"{parameters / 1e6:.2f} M", f"{count_macs(model, task) / 1e6:.0f} M"])
            print(*rows[-1], sep=", ", flush=True)
            train(model, loss_of, args.steps)
            found[task] = find(model.eval(), images, task)
            rows[-1].append(score(found[task], masks, targets, task))
            print(f"    {rows[-1][-1]}", flush=True)
            with (args.output / "results.csv").open("w", newline="") as file:
                csv.writer(file).writerows([["backbone", "model", "parameters", "MACs", "score"], *rows])
        if found and backbone == BACKBONES["ConvMixer, CIFAR-10 weights"]:
            draw(args.output / "dense.png", images[:6], found["masks"][:6], found["boxes"][:6])


if __name__ == "__main__":
    main()
