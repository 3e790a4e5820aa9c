"""A teacher's answers against the same model computed plainly, and the loss against its formula."""

from pathlib import Path

import pytest
import timm
import torch
from conftest import SMALL_MODEL, write_digits
from torchvision.transforms import v2

import convmixer
from convmixer.errors import ArgumentError, UnknownModelError, WeightsError
from convmixer.hub import client
from convmixer.training import get_recipe, train
from convmixer.training.distillation import Teacher, distillation_loss

CPU = torch.device("cpu")
CLASSES = ("bird", "cat", "dog")
SIZES = [(32, 32)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small model with a preprocessing of its own."""
    torch.manual_seed(0)
    model = convmixer.create_model("convmixer_128_8_ks7_p2", num_classes=3, device="cpu")
    model.pretrained_cfg |= {"label_names": CLASSES, "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}
    path = tmp_path_factory.mktemp("teacher")
    convmixer.save_pretrained(model, path)
    return path


def student(**fields):
    model = convmixer.create_model("convmixer_128_8_ks7_p2", device="cpu")
    return dict(model.pretrained_cfg) | fields


def test_the_loss_is_a_divergence():
    logits, teacher = torch.randn(5, 7, dtype=torch.float64, requires_grad=True), torch.randn(5, 7, dtype=torch.float64)
    for temperature in (0.5, 1.0, 4.0):
        loss = distillation_loss(logits, teacher, temperature)
        p, q = (torch.softmax(z / temperature, 1) for z in (teacher, logits))
        torch.testing.assert_close(loss, temperature**2 * (p * (p / q).log()).sum() / 5)
        (grad,) = torch.autograd.grad(loss, logits)
        torch.testing.assert_close(grad, temperature * (q - p).detach() / 5)
    assert distillation_loss(teacher, teacher, 2.0).item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("classes", [CLASSES, ("dog", "bird", "cat")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_teacher_answers_what_its_model_does(folder, classes, dtype):
    images = torch.rand(4, 3, 32, 32)
    config = student()
    mean, std = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))
    model = convmixer.create_model(f"local-dir:{folder}", pretrained=True, device="cpu").eval()
    own_mean, own_std = (torch.tensor(values)[:, None, None] for values in ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)))
    with torch.no_grad():
        expected = model((images - own_mean) / own_std)[:, [CLASSES.index(name) for name in classes]]
    found = Teacher(f"local-dir:{folder}", config, classes, CPU, dtype, sizes=SIZES)((images - mean) / std)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    tolerance = 1e-4 if dtype == torch.float32 else 0.05 * expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def test_a_grey_teacher(tmp_path):
    model = convmixer.create_model("convmixer_128_8_ks7_p2", num_classes=3, in_chans=1, device="cpu")
    model.pretrained_cfg |= {"label_names": CLASSES}
    convmixer.save_pretrained(model, tmp_path / "grey")
    config = student()
    config |= {name: (sum(config[name]) / 3,) for name in ("mean", "std")}
    found = Teacher(f"local-dir:{tmp_path / 'grey'}", config, CLASSES, CPU, torch.float32, sizes=SIZES)
    inputs = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(found(inputs), model.eval()(inputs), rtol=0, atol=1e-4)


def of_timm(monkeypatch, name):
    """Make a model of timm for three classes, which timm then returns instead of loading weights."""
    made, real = timm.create_model(name, num_classes=3).eval(), timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda asked, **k: made if asked == name else real(asked, **k))
    return made


def test_a_teacher_of_one_size(monkeypatch):
    """timm builds it for its size; the student's images are resized to that, which is said."""
    made = of_timm(monkeypatch, "test_vit")
    said: list[str] = []
    config = student(mean=made.pretrained_cfg["mean"], std=made.pretrained_cfg["std"])
    sizes = [(24, 24), (32, 32), (160, 160)]
    teacher = Teacher("test_vit", config, CLASSES, CPU, torch.float32, sizes=sizes, report=said.append)
    pixels = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))
    large = torch.stack([v2.functional.resize(x.float() / 255, [160, 160], antialias=True) for x in pixels])
    with torch.no_grad():
        expected = made((large - mean) / std)
        torch.testing.assert_close(teacher((pixels / 255 - mean) / std), expected, rtol=0, atol=1e-4)
        assert torch.equal(teacher(large), made(large))
    resized = "the teacher 'test_vit' takes only images of 160x160 pixels: those of {} are resized for it"
    assert said[:-1] == [resized.format("24x24"), resized.format("32x32")]


def test_images_too_small_for_a_teacher(folder):
    text = r"does not take images of 1x1 pixels: .* one 2x2 patch: resize it\. Give another teacher, or larger images"
    with pytest.raises(ArgumentError, match=text):
        Teacher(f"local-dir:{folder}", student(), CLASSES, CPU, torch.float32, sizes=[(1, 1)])


def test_a_teacher_of_timm(monkeypatch):
    """Its classes have no names, which is said; images keep their size."""
    made = of_timm(monkeypatch, "resnet10t")
    said: list[str] = []
    inputs = torch.randn(2, 3, 32, 32)
    config = student(mean=made.pretrained_cfg["mean"], std=made.pretrained_cfg["std"])
    teacher = Teacher("resnet10t", config, CLASSES, CPU, torch.float32, sizes=SIZES, report=said.append)
    with torch.no_grad():
        assert torch.equal(teacher(inputs), made(inputs))
    assert said == ["the teacher 'resnet10t' names no classes: its 3 are taken to be those of the images, in order"]


@pytest.mark.parametrize(
    ("name", "classes", "channels", "error", "text"),
    [
        (
            "convmixer_256_8.cifar10",
            CLASSES,
            3,
            ArgumentError,
            r"knows 10 classes: airplane, .* the images have 3: bird",
        ),
        ("convmixer_256_8.cifar10", CLASSES, 1, ArgumentError, r"of 3 channels, the student of 1: set in_chans=3"),
        ("convmixer_256_8.cifar11", CLASSES, 3, UnknownModelError, "convmixer_256_8.cifar10"),
        ("convmixer_512_12", CLASSES, 3, WeightsError, "convmixer_512_12 has no weights"),
        ("resnet18", CLASSES, 3, WeightsError, "teacher='resnet18': timm cannot load its weights"),
    ],
)
def test_teachers_that_cannot_be(monkeypatch, name, classes, channels, error, text):
    monkeypatch.setattr(client.constants, "HF_HUB_OFFLINE", True)
    config = student()
    config = config | {n: config[n][:channels] for n in ("mean", "std")}
    with pytest.raises(error, match=text):
        Teacher(name, config, classes, CPU, torch.float32, sizes=SIZES)


@pytest.mark.usefixtures("no_curves")
def test_a_student_learns_only_from_its_teacher(tmp_path):
    """Labels that say nothing: all that the student knows then comes from the teacher."""
    digits = write_digits(tmp_path / "digits", 200, 100, ["digit 0", "digit 1"])
    quick = {"epochs": 4, "batch_size": 20, "lr": 0.01, "flip": 0.0, **SMALL_MODEL}
    teacher = train(get_recipe("cifar10", **quick), digits, tmp_path / "teacher", device="cpu", report=len)
    shuffled = tmp_path / "shuffled"
    for i, path in enumerate(sorted((digits / "train").rglob("*.png"))):
        label = shuffled / "train" / f"digit {i % 2}"
        label.mkdir(parents=True, exist_ok=True)
        (label / f"{i}.png").write_bytes(path.read_bytes())
    recipe = get_recipe("cifar10", **quick, teacher=str(tmp_path / "teacher"), distillation=1.0, temperature=1.0)
    recipe = recipe.override(epochs=8)
    student = train(recipe, shuffled, tmp_path / "student", tests=[digits / "test"], device="cpu", report=len)
    (right,) = student.test_accuracy.values()
    assert min(teacher.test_accuracy.values()) > 90
    assert right > 85


@pytest.mark.usefixtures("no_curves")
def test_a_run_is_resumed_only_with_its_teacher(tmp_path):
    digits = write_digits(tmp_path / "digits", 40, 20, ["digit 0", "digit 1"])
    quick = {"epochs": 1, "batch_size": 20, "flip": 0.0, **SMALL_MODEL}
    for name, seed in (("teacher", 0), ("other", 1)):
        train(get_recipe("cifar10", **quick, seed=seed), digits, tmp_path / name, device="cpu", report=len)
    recipe = get_recipe("cifar10", **quick, teacher=str(tmp_path / "teacher"))
    train(recipe, digits, tmp_path / "student", device="cpu", report=len)
    longer = recipe.override(epochs=2)
    weights = tmp_path / "teacher" / "model.safetensors"
    original = weights.read_bytes()
    weights.write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    before = {file: file.read_bytes() for file in (tmp_path / "student").rglob("*.*") if file.name != ".lock"}
    text = (
        r"cannot resume .*last\.pt': teacher='.*teacher' is not the model .* restore them, or train in another folder"
    )
    with pytest.raises(ArgumentError, match=text):
        train(longer, digits, tmp_path / "student", device="cpu", resume=True, report=len)
    assert all(file.read_bytes() == content for file, content in before.items())
    weights.write_bytes(original)
    assert len(train(longer, digits, tmp_path / "student", device="cpu", resume=True, report=len).history) == 2


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"distillation": 0.0}, r"recipe field distillation=0.0: give a number in \(0, 1\]"),
        ({"temperature": 0.0}, r"recipe field temperature=0.0: give a finite number above 0"),
        ({"teacher": None}, r"recipe field teacher=None: give the name of a model, or the folder of a run"),
    ],
)
def test_fields_that_make_no_sense(fields, text):
    with pytest.raises(ArgumentError, match=text):
        get_recipe("cifar10", **fields)
