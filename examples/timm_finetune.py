"""Fine-tune a model of this package with timm's own parts, on a real set written as images: scikit-learn's digits.

pip install scikit-learn && python examples/timm_finetune.py
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits
from timm.data import Mixup, create_dataset, create_loader, resolve_model_data_config
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import accuracy

import convmixer  # noqa: F401 - from here on timm knows its models

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--data", type=Path, help="where to write the images; by default a temporary folder")
args = parser.parse_args()
root = args.data or Path(tempfile.mkdtemp())

digits = load_digits()
for i, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
    folder = root / ("validation" if i % 4 == 0 else "train") / str(label)
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray((pixels * 15).astype(np.uint8)).save(folder / f"{i:04}.png")

torch.manual_seed(0)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
model = timm.create_model("convmixer_256_8", pretrained=True)
model.reset_classifier(10)  # as many classes as before, but other ones
model.to(device)
config = resolve_model_data_config(model) | {"input_size": (3, 16, 16)}


def loader(split: str, training: bool):
    dataset = create_dataset("", root=str(root), split=split, is_training=training)
    augmentation = {"hflip": 0.0, "scale": (0.7, 1.0), "ratio": (0.9, 1.1), "color_jitter": None}  # digits have a side
    return create_loader(
        dataset, **config, batch_size=64, is_training=training, num_workers=0, device=device, **augmentation
    )


train, validation = loader("train", True), loader("validation", False)
mixup = Mixup(mixup_alpha=0.1, label_smoothing=0.1, num_classes=10)
loss_of = SoftTargetCrossEntropy()
optimizer = create_optimizer_v2(model, opt="adamw", lr=2e-3, weight_decay=0.05, layer_decay=0.8)
schedule, epochs = create_scheduler_v2(
    optimizer, sched="cosine", num_epochs=args.epochs, warmup_epochs=1 if args.epochs > 1 else 0, warmup_lr=1e-4
)

for epoch in range(epochs):
    model.train()
    for images, labels in train:
        images, labels = mixup(images, labels)
        loss = loss_of(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    schedule.step(epoch + 1)
    model.eval()
    with torch.inference_mode():
        scores = [(accuracy(model(images), labels)[0].item(), len(labels)) for images, labels in validation]
    top1 = sum(score * count for score, count in scores) / sum(count for _, count in scores)
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}, validation accuracy {top1:.1f} %")
