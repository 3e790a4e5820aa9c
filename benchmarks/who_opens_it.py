"""Who opens a model of this package, and how far are its logits from the model's: a table in Markdown.

pip install ".[dev]" && python benchmarks/who_opens_it.py
"""

import argparse
import tempfile
from importlib import metadata
from pathlib import Path

import timm
import torch
from transformers import AutoModelForImageClassification

import convmixer

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="convmixer_256_8.cifar10", help="any name of create_model")
parser.add_argument("--images", type=int, default=64, help="random ones, one at a time and in batches of 8")
args = parser.parse_args()


def with_convmixer(folder):
    return convmixer.create_model(f"local-dir:{folder}", pretrained=True, device="cpu").eval()


def with_timm(folder):
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def with_transformers(folder):
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    return lambda images: model(images).logits


def with_onnxruntime(folder):
    import onnxruntime

    convmixer.export_model(model, folder / "model.onnx")
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def with_openvino(folder):
    import openvino

    convmixer.export_model(model, folder / "model.xml")
    # By default it computes in bfloat16 on processors that are faster in it.
    compiled = openvino.Core().compile_model(folder / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda images: torch.from_numpy(compiled({"images": images.numpy()})["logits"].copy())


torch.manual_seed(0)
model = convmixer.create_model(args.model, pretrained=True, device="cpu").eval()
images = torch.randn(args.images, *model.pretrained_cfg["input_size"])
batches = [*images.split(1), *images.split(8)]
openers = {
    "convmixer": with_convmixer,
    "timm": with_timm,
    "transformers": with_transformers,
    "onnxruntime": with_onnxruntime,
    "openvino": with_openvino,
}
with tempfile.TemporaryDirectory() as temporary, torch.inference_mode():
    folder = convmixer.save_pretrained(model, Path(temporary) / "model")
    expected = [model(batch) for batch in batches]
    largest = torch.cat(expected).abs().max()
    print(f"{args.model}, {len(images)} images, torch {torch.__version__}; logits up to {largest:.1f}\n")
    print("| library | largest difference of a logit |\n| --- | --: |")
    for library, opener in openers.items():
        compute = opener(folder)
        difference = max(
            (compute(batch) - logits).abs().max().item() for batch, logits in zip(batches, expected, strict=True)
        )
        print(f"| {library} {metadata.version(library)} | {difference:.1e} |")
