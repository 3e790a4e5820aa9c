"""Exports: each file is opened by the runtime that it is for, outside the package's own check."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command import run
from conftest import shake
from safetensors import safe_open
from torch import nn
from torch.nn.utils import prune

import convmixer
from convmixer.errors import ArgumentError, ConvMixerError, DependencyError, ExportError, WriteError
from convmixer.hub.checkpoints import save_weights
from convmixer.runtime import export, openvino_core
from convmixer.runtime.export import FORMATS, export_model

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
LABELS = ("cat", "dog \x1b[2J", "[red]")
IMAGES = torch.linspace(0, 1, 2 * 3 * 12 * 12).view(2, 3, 12, 12).sin().abs()
ALLOWED = {"float32": 1e-5, "float16": 1e-2}


@pytest.fixture
def model():
    model = shake(convmixer.ConvMixer(8, 2, 4, 3, num_classes=3))
    model.pretrained_cfg = {
        "architecture": "convmixer_256_8",
        "input_size": (3, 12, 12),
        "mean": MEAN,
        "std": STD,
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "crop_mode": "center",
        "label_names": LABELS,
    }
    return model.train()  # as create_model leaves it


@torch.no_grad()
def expected(model, images=IMAGES):
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    model.eval()
    return model((images - mean) / std)


def normalized(images=IMAGES):
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (images - mean) / std


def run_onnx(path, images):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the export extra is not installed")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,), (result,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, result.name, result.type) == ("images", "tensor(float)", "logits", "tensor(float)")
    return session.run(None, {"images": images.numpy()})[0], session.get_modelmeta().custom_metadata_map


def run_openvino(path, images):
    pytest.importorskip("openvino", reason="the export extra is not installed")
    core = openvino_core.core()
    model = core.read_model(path)
    metadata = {key: model.get_rt_info(["convmixer", key]).value for key in ("label_names", "mean", "input_size")}
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled({"images": images.numpy()})["logits"], metadata


def run_torch_export(path, images):
    files = {"metadata.json": ""}
    program = torch.export.load(path, extra_files=files)
    return program.module()(images).detach().numpy(), json.loads(files["metadata.json"])


def run_safetensors(path, images):
    model = convmixer.ConvMixer(8, 2, 4, 3, num_classes=3).eval()
    convmixer.load_checkpoint(model, path)
    with safe_open(path, framework="pt") as file, torch.no_grad():
        return model(images).numpy(), file.metadata()


def run_executorch(path, images):
    runtime = pytest.importorskip("executorch.runtime", reason="the executorch extra is not installed").Runtime.get()
    program = runtime.load_program(path)
    (metadata,) = program.load_method("metadata").execute([])
    return program.load_method("forward").execute([images.contiguous()])[0].numpy(), json.loads(metadata)


RUNS = {
    "onnx": run_onnx,
    "openvino": run_openvino,
    "executorch": run_executorch,
    "torch-export": run_torch_export,
    "safetensors": run_safetensors,
}
LIBRARIES = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino",),
    "coreml": ("coremltools",),
    "executorch": ("executorch.exir",),
}


def distance(found, model):
    reference = expected(model).numpy()
    return np.abs(found - reference).max() / np.abs(reference).max()


def need(format):
    for module in LIBRARIES.get(format, ()):
        pytest.importorskip(module, reason="an extra is not installed")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("format", RUNS)
def test_every_format(model, tmp_path, format, dtype):
    """Other batch sizes than any that the exporter saw, up to what every format takes."""
    need(format)
    if getattr(torch, dtype) not in FORMATS[format].dtypes:
        pytest.skip("the format has no such type")
    path = tmp_path / f"m{FORMATS[format].suffix}"
    before = {key: value.clone() for key, value in model.state_dict().items()}
    result = export_model(model, path, dtype=getattr(torch, dtype))
    assert (result.path, result.format, result.folded) == (path, format, format != "safetensors")
    assert 0 <= result.difference < ALLOWED[dtype]
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    for count in (1, 64):
        found, metadata = RUNS[format](path, normalized().repeat(32, 1, 1, 1)[:count])
        assert found.shape == (count, 3)
    assert distance(found[-2:], model) < ALLOWED[dtype]
    assert json.loads(metadata["label_names"]) == list(LABELS)
    assert json.loads(metadata["mean"]) == list(MEAN)
    assert json.loads(metadata["input_size"]) == [3, 12, 12]
    files = {path, path.with_suffix(".bin")} if format == "openvino" else {path}
    assert set(tmp_path.iterdir()) == files
    weights = sum(p.numel() for p in model.parameters()) * (4 if dtype == "float32" else 2)
    if format == "openvino":
        assert path.with_suffix(".bin").stat().st_size < 1.3 * weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_coreml(model, tmp_path, dtype):
    """Its runtime is Apple's, so Core ML's tools read the specification: inputs, outputs, layers and weights."""
    coremltools = pytest.importorskip("coremltools", reason="the coreml extra is not installed")
    path = tmp_path / "m.mlpackage"
    for _ in range(2):  # the second replaces the first
        result = export_model(model, path, dtype=dtype)
    assert (result.format, result.outputs, result.folded) == ("coreml", ("logits",), True)
    assert sys.platform == "darwin" or np.isnan(result.difference)
    assert os.listdir(tmp_path) == ["m.mlpackage"]
    spec = coremltools.utils.load_spec(str(path))
    (given,), (output,) = spec.description.input, spec.description.output
    assert (given.name, output.name) == ("images", "logits")
    assert list(given.type.multiArrayType.shape)[1:] == [3, 12, 12]
    bounds = given.type.multiArrayType.shapeRange.sizeRanges[0]
    assert (bounds.lowerBound, bounds.upperBound) == (1, 64)
    metadata = spec.description.metadata.userDefined
    assert json.loads(metadata["label_names"]) == list(LABELS)
    (block,) = spec.mlProgram.functions["main"].block_specializations.values()
    kinds = [operation.type for operation in block.operations]
    assert (kinds.count("conv"), kinds.count("linear"), kinds.count("gelu")) == (5, 1, 5)
    weights = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    stored = sum(file.stat().st_size for file in path.rglob("*.bin"))
    assert 0.8 * weights < stored < 1.6 * weights


@pytest.mark.parametrize("format", ["onnx", "openvino", "executorch", "torch-export", "coreml", "safetensors"])
def test_features(tmp_path, format):
    """Of a backbone each block's map by its name."""
    need(format)
    options = {"dim": 8, "depth": 4, "kernel_size": 3, "patch_size": 2, "in_chans": 1, "device": "cpu"}
    backbone = convmixer.create_model("convmixer_256_8", features_only=True, out_indices=(0, 2), **options)
    shake(backbone)
    path = tmp_path / f"m{FORMATS[format].suffix}"
    result = export_model(backbone, path, image_size=8)
    assert result.outputs == ("features_0", "features_2")
    x = torch.rand(5, 1, 8, 8)
    with torch.no_grad():
        expected = backbone.eval()(x)
    if format == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        assert "label_names" not in session.get_modelmeta().custom_metadata_map
        found = session.run(["features_0", "features_2"], {"images": x.numpy()})
    elif format == "openvino":
        compiled = openvino_core.core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        answers = compiled({"images": x.numpy()})
        found = [answers["features_0"], answers["features_2"]]
    elif format == "executorch":
        from executorch.runtime import Runtime

        found = Runtime.get().load_program(path).load_method("forward").execute([x])
    elif format == "torch-export":
        found = torch.export.load(path).module()(x)
    elif format == "coreml":
        import coremltools

        spec = coremltools.utils.load_spec(str(path))
        assert [output.name for output in spec.description.output] == ["features_0", "features_2"]
        return
    else:
        again = convmixer.create_model(
            "convmixer_256_8", checkpoint=path, features_only=True, out_indices=(0, 2), **options
        )
        with torch.no_grad():
            found = again.eval()(x)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.as_tensor(a), b, rtol=1e-4, atol=1e-5)


def test_opset(model, tmp_path):
    onnx = pytest.importorskip("onnx")
    need("onnx")
    for given, written in ((None, 18), (18, 18), (20, 20), (23, 23)):
        export_model(model, tmp_path / "m.onnx", opset=given)
        (domain,) = (o for o in onnx.load(tmp_path / "m.onnx").opset_import if not o.domain)
        assert domain.version == written
    with pytest.raises(ExportError, match=r"opset"):
        export_model(model, tmp_path / "n.onnx", opset=999)
    assert os.listdir(tmp_path) == ["m.onnx"]


def test_any_size_and_normalization(model, tmp_path):
    """Images in [0, 1] of other sizes than the exporter saw."""
    need("onnx")
    result = export_model(model, tmp_path / "m.onnx", normalization=True, dynamic_size=True, image_size=(9, 15))
    assert result.difference < 1e-5
    for height, width in (12, 12), (3, 20), (31, 6):
        images = torch.rand(2, 3, height, width)
        found, metadata = run_onnx(tmp_path / "m.onnx", images)
        torch.testing.assert_close(torch.from_numpy(found), expected(model, images), rtol=1e-4, atol=1e-5)
    assert (json.loads(metadata["mean"]), json.loads(metadata["std"])) == ([0.0] * 3, [1.0] * 3)
    assert json.loads(metadata["input_size"]) == [3, 9, 15]


def test_open_sizes_from_a_single_patch(model, tmp_path):
    patch = model.patch_size
    export_model(model, tmp_path / "m.pt2", image_size=patch, dynamic_size=True)
    images = torch.rand(1, 3, 3 * patch, 4 * patch)
    assert torch.allclose(torch.export.load(tmp_path / "m.pt2").module()(normalized(images)), expected(model, images))


def test_fixed_size_is_kept_to(model, tmp_path):
    export_model(model, tmp_path / "m.pt2", fold=False)
    program = torch.export.load(tmp_path / "m.pt2").module()
    assert any("batch_norm" in str(node.target) for node in torch.export.load(tmp_path / "m.pt2").graph.nodes)
    with pytest.raises((RuntimeError, AssertionError)):
        program(torch.rand(2, 3, 15, 15))


@pytest.mark.parametrize("dynamic", [False, True])
def test_sizes_of_openvino_and_onnx(model, tmp_path, dynamic):
    """A fixed size is kept to there, too; the batch is open in any case."""
    onnxruntime, openvino = pytest.importorskip("onnxruntime"), pytest.importorskip("openvino")
    sides = [-1, -1] if dynamic else list(IMAGES.shape[2:])
    export_model(model, tmp_path / "m.xml", dynamic_size=dynamic)
    (given,) = openvino_core.core().read_model(tmp_path / "m.xml").inputs
    assert given.partial_shape == openvino.PartialShape([-1, 3, *sides])
    export_model(model, tmp_path / "m.onnx", dynamic_size=dynamic)
    (given,) = onnxruntime.InferenceSession(tmp_path / "m.onnx").get_inputs()
    assert [side if isinstance(side, int) else -1 for side in given.shape] == [-1, 3, *sides]


def test_what_optimize_made_and_what_has_no_preprocessing(model, tmp_path):
    export_model(convmixer.optimize(model, normalization=True), tmp_path / "folded.pt2")
    found, metadata = run_torch_export(tmp_path / "folded.pt2", IMAGES)
    assert distance(found, model) < 1e-5
    assert json.loads(metadata["mean"]) == [0.0] * 3
    bare = shake(convmixer.ConvMixer(8, 1, 3, 2, in_chans=1, num_classes=0))
    with pytest.raises(ArgumentError, match=r"says nothing about its preprocessing: give image_size=\(height, width\)"):
        export_model(bare, tmp_path / "bare.pt2")
    export_model(bare, tmp_path / "bare.pt2", image_size=8)
    x = torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(torch.export.load(tmp_path / "bare.pt2").module()(x), bare(x))


def test_bfloat16(model, tmp_path):
    assert 1e-4 < export_model(model, tmp_path / "m.pt2", dtype=torch.bfloat16).difference < 0.1
    with pytest.raises(ArgumentError, match=r"dtype=torch\.bfloat16; valid for onnx: torch\.float32, torch\.float16"):
        export_model(model, tmp_path / "m.onnx", dtype=torch.bfloat16)


# ---- what goes wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [0.01, float("nan")])
def test_a_file_that_computes_something_else_is_not_kept(model, tmp_path, monkeypatch, change):
    path = tmp_path / "m.pt2"
    path.write_bytes(b"old")
    real = torch.export.load

    def load(file):
        program = real(file).module()
        return nn.ModuleList([type("Wrong", (nn.Module,), {"forward": lambda _, x: program(x) + change})()])[0], file

    monkeypatch.setattr(export.torch.export, "load", lambda file: type("P", (), {"module": lambda _: load(file)[0]})())
    with pytest.raises(ExportError, match=r"m\.pt2 differs from the model by .* nothing was written"):
        export_model(model, path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["m.pt2"]


def test_weights_beyond_half_precision(model, tmp_path):
    with torch.no_grad():
        model.head.weight.mul_(1e6)
    with pytest.raises(ExportError, match=r"differs from the model by inf .* Export it as float32"):
        export_model(model, tmp_path / "m.pt2", dtype=torch.float16)
    assert os.listdir(tmp_path) == []


class Odd(nn.Module):
    """An activation that depends on values, which no graph can hold."""

    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_an_older_file_stays_where_its_weights_cannot_be_written(model, tmp_path, monkeypatch):
    pytest.importorskip("openvino")
    export_model(model, tmp_path / "m.xml", image_size=8)
    before = (tmp_path / "m.xml").read_bytes()
    (tmp_path / "m.bin").unlink()
    (tmp_path / "m.bin").mkdir()
    with pytest.raises(ConvMixerError, match=r"cannot write '.*m\.bin'"):
        export_model(model, tmp_path / "m.xml", image_size=8)
    assert (tmp_path / "m.xml").read_bytes() == before

    (tmp_path / "m.bin").rmdir()
    real = Path.replace

    def refuse(self, target):  # as Windows does while a program has the file open
        if Path(target).suffix == suffix:
            raise PermissionError(13, "Permission denied")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", refuse)
    suffix = ".bin"
    with pytest.raises(ConvMixerError):
        export_model(model, tmp_path / "m.xml", image_size=8)
    assert (tmp_path / "m.xml").read_bytes() == before
    suffix = ".xml"  # an old graph must not meet new weights
    with pytest.raises(WriteError, match=r"'m\.bin' is new, and 'm\.xml' is gone\. Export again"):
        export_model(model, tmp_path / "m.xml", image_size=8)
    assert not (tmp_path / "m.xml").exists()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_pruned_model(tmp_path):
    """Whose weights are computed in each call, and which deepcopy refuses."""
    model = convmixer.ConvMixer(8, 2, 3, 2, num_classes=3).eval()
    prune.l1_unstructured(model.blocks[0][1], "weight", 0.5)
    prune.l1_unstructured(model.head, "weight", 0.5)
    assert export_model(model, tmp_path / "m.pt2", image_size=8).difference < 1e-5
    assert export_model(model, tmp_path / "n.pt2", image_size=8, fold=False).difference < 1e-5


def test_a_model_that_no_graph_can_hold(tmp_path):
    model = convmixer.ConvMixer(4, 1, 3, 2, num_classes=2, act_layer=Odd)
    with pytest.raises(ExportError, match="the export to torch-export failed: "):
        export_model(model, tmp_path / "m.pt2", image_size=8)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("m.tflite", {}, r"cannot tell the format of .*m\.tflite': let it end in \.onnx, \.xml, \.mlpackage, \.pte, "),
        ("m.onnx", {"format": "openvin"}, "unknown format 'openvin'; did you mean openvino"),
        ("m.bin", {"format": "openvino"}, r"a file of the format openvino ends in \.xml"),
        ("m.pt2", {"dtype": torch.float64}, r"dtype=torch\.float64; valid for torch-export: "),
        ("m.safetensors", {"fold": True}, "holds a model's own weights"),
        ("m.pt2", {"fold": False, "normalization": True}, "normalization is part of folding"),
        ("m.pt2", {"image_size": 2}, "image_size=2: give one or two whole numbers of at least a patch, 3 pixels"),
        ("m.pt2", {"image_size": (8, 8, 8)}, r"image_size=\(8, 8, 8\)"),
        ("none/m.pt2", {}, "there is no folder"),
        ("m.onnx", {"opset": 17}, "opset=17: it is for the format onnx, a whole number of at least 18"),
        ("m.xml", {"opset": 18}, "opset=18: it is for the format onnx"),
        ("m.mlpackage", {"dynamic_size": True}, "dynamic_size: coreml plans memory ahead: leave it out"),
        ("m.pte", {"dtype": torch.float16}, r"dtype=torch\.float16; valid for executorch: torch\.float32"),
    ],
)
def test_senseless_choices(model, tmp_path, name, options, text):
    with pytest.raises(ArgumentError, match=text):
        export_model(model, tmp_path / name, **options)
    assert os.listdir(tmp_path) == []


def test_other_modules(tmp_path):
    with pytest.raises(ArgumentError, match=r"cannot export a torch\.nn\.modules\.linear\.Linear, which is not a"):
        export_model(nn.Linear(1, 1), tmp_path / "m.pt2")


@pytest.mark.parametrize(
    ("format", "module"), [("onnx", "onnxruntime"), ("onnx", "onnxscript"), ("openvino", "openvino")]
)
def test_missing_libraries(model, tmp_path, monkeypatch, format, module):
    need(format)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DependencyError, match=rf"{format} needs {module}, .*: pip install 'convmixer\[export\]'"):
        export_model(model, tmp_path / f"m{FORMATS[format].suffix}")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("changes", [{"act_layer": "relu"}, {"global_pool": "max"}])
def test_a_weights_file_is_refused_that_would_be_opened_as_another_model(tmp_path, changes):
    model = convmixer.create_model("convmixer_256_8", device="cpu", **changes)
    with pytest.raises(ArgumentError, match=r"has no place for (act_layer='relu'|global_pool='max').*--format hub"):
        convmixer.export_model(model, tmp_path / "w.safetensors")
    assert not list(tmp_path.iterdir())


# ---- the command ----------------------------------------------------------------------------------------------------


def test_export_a_model_a_run_and_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = run("export", "convmixer_256_8", "--format", "safetensors", "--dtype", "float16").stdout
    assert "convmixer_256_8.float16.safetensors: safetensors, float16" in output
    trained = convmixer.create_model("convmixer_128_8_ks7_p2", device="cpu", num_classes=2)
    (tmp_path / "run").mkdir()
    save_weights(trained, "run/model.safetensors", {"label_names": ["tom", "jerry"], "input_size": [3, 16, 16]})
    (tmp_path / "run" / "recipe.json").write_text('{"model": "convmixer_128_8_ks7_p2"}')
    assert run("export", "run", "--format", "torch-export").stdout.startswith("run.pt2: torch-export, float32, folded")
    _, metadata = run_torch_export("run.pt2", torch.zeros(1, 3, 16, 16))
    assert json.loads(metadata["label_names"]) == ["tom", "jerry"]
    other = tmp_path / "other.safetensors"
    run("export", "run/model.safetensors", "--format", "safetensors", "--output", other)
    again = convmixer.create_model("convmixer_128_8_ks7_p2", checkpoint=other, device="cpu")
    assert again.pretrained_cfg["label_names"] == ("tom", "jerry")
    assert torch.equal(again.head.weight, trained.head.weight)


def test_the_source_is_not_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_weights(convmixer.create_model("convmixer_256_8", device="cpu"), "w.safetensors")
    before = (tmp_path / "w.safetensors").read_bytes()
    stderr = run("export", "w.safetensors", "--format", "safetensors", status=2).stderr
    assert "'w.safetensors' is the file that is exported: set another --output" in stderr
    assert (tmp_path / "w.safetensors").read_bytes() == before
    (tmp_path / "foreign.safetensors").write_bytes(b"no weights")
    assert (
        "is not a whole safetensors file" in run("export", "foreign.safetensors", "--format", "onnx", status=2).stderr
    )


def test_features_by_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ("export", "convmixer_256_8", "--format", "safetensors", "--features", "3", "--features", "-8")
    assert "features_0 and features_3 within 0.0e+00" in run(*options).stdout
    again = convmixer.create_model(
        "convmixer_256_8",
        checkpoint="convmixer_256_8-features.safetensors",
        features_only=True,
        out_indices=(0, 3),
        device="cpu",
    )
    whole = convmixer.create_model("convmixer_256_8", pretrained=True, device="cpu")
    assert torch.equal(again.model.blocks[3][1].weight, whole.blocks[3][1].weight)
    assert "different block indices from -8 to 7" in run(*options[:-1], "8", status=2).stderr


def test_formats_of_other_extras(model, tmp_path, monkeypatch):
    for format, module in (("coreml", "coremltools"), ("executorch", "executorch.exir")):
        monkeypatch.setitem(sys.modules, module, None)
        name = module.partition(".")[0]
        with pytest.raises(DependencyError, match=rf"the format {format} needs {name}, .*'convmixer\[{format}\]'"):
            export_model(model, tmp_path / f"m{FORMATS[format].suffix}")
    assert os.listdir(tmp_path) == []
