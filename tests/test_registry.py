"""The table against closed formulas, timm, counted operations and the files themselves."""

import dataclasses
import hashlib
import re

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import convmixer
from convmixer.errors import ArgumentError, UnknownModelError
from convmixer.registry import CIFAR10_CLASSES, VARIANTS, get_variant

ALL = [v.name for v in VARIANTS]
CIFAR10 = ["convmixer_256_8", "convmixer_128_8_ks7_p2", "convmixer_256_8_ks9_p1"]
TIMM = ["convmixer_1536_20", "convmixer_768_32", "convmixer_1024_20_ks9_p14"]


@pytest.mark.parametrize("name", ALL)
def test_parameters(name):
    v = convmixer.model_info(name)
    h, d, k, p, n = v.dim, v.depth, v.kernel_size, v.patch_size, v.num_classes
    formula = 3 * h * p**2 + h + 2 * h + d * (h * k**2 + h + 2 * h + h**2 + h + 2 * h) + h * n + n
    model = convmixer.create_model(name, device="meta")
    assert v.parameters == formula == sum(q.numel() for q in model.parameters())


@pytest.mark.parametrize("name", TIMM)
def test_parameters_of_timm(name):
    model = timm.create_model(name, device="meta")
    assert type(model).__module__.startswith("timm.")
    assert convmixer.model_info(name).parameters == sum(q.numel() for q in model.parameters())


@pytest.mark.parametrize("name", ALL)
def test_macs(name):
    v = convmixer.model_info(name)
    model = convmixer.create_model(name, device="meta").eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, *v.input_size, device="meta"))
    assert 2 * v.macs == counter.get_total_flops()


@pytest.mark.parametrize(
    ("name", "shown"),
    [("convmixer_1536_20", (51.63, 51.10)), ("convmixer_768_32", (21.11, 20.68)),
     ("convmixer_1024_20_ks9_p14", (24.38, 5.95))],
)  # fmt: skip
def test_published_sizes(name, shown):
    v = convmixer.model_info(name)
    assert (round(v.parameters / 1e6, 2), round(v.macs / 1e9, 2)) == shown


@pytest.mark.parametrize("name", TIMM)
def test_preprocessing_is_that_of_timm(name):
    v, theirs = convmixer.model_info(name), timm.models.get_pretrained_cfg(name)
    fields = ("input_size", "crop_pct", "interpolation", "mean", "std", "num_classes")
    assert [getattr(v, f) for f in fields] == [getattr(theirs, f) for f in fields]
    assert v.weights[0].hub_id == theirs.hf_hub_id
    assert v.weights[0].tag == theirs.tag


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.weights], ids=lambda v: v.name)
def test_weights_records(variant):
    for weights in variant.weights:
        assert weights.licence == "MIT"
        assert weights.training_data
        assert weights.recipe
        assert all(0 < m.value < 100 and m.dataset and m.measured_by for m in weights.metrics)
        if weights.path:
            content = weights.path.read_bytes()
            assert (hashlib.sha256(content).hexdigest(), len(content)) == (weights.sha256, weights.size)
            assert len(weights.label_names) == variant.num_classes


def test_names_without_weights_say_so():
    for variant in VARIANTS:
        assert bool(variant.weights) != ("No public weights" in variant.note)


def test_label_names():
    assert get_variant("convmixer_256_8.cifar10")[1].label_names == CIFAR10_CLASSES
    assert len(CIFAR10_CLASSES) == 10


def test_names_are_unique_and_patterns_filter():
    assert len(set(ALL)) == len(ALL)
    assert convmixer.list_models() == sorted(ALL)
    assert convmixer.list_models("*_256_8*") == ["convmixer_256_8", "convmixer_256_8_ks9_p1"]
    assert convmixer.list_models(pretrained=True) == sorted([*TIMM, *CIFAR10])
    assert convmixer.list_pretrained("*cifar10") == [f"{name}.cifar10" for name in sorted(CIFAR10)]
    assert convmixer.list_models("resnet*") == []
    for listed in (convmixer.list_models, convmixer.list_pretrained):
        with pytest.raises(ArgumentError, match=r"pattern=None: give a string such as"):
            listed(None)
    with pytest.raises(UnknownModelError, match=r"unknown model None: give a string such as"):
        convmixer.model_info(None)


def test_records_are_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        convmixer.model_info("convmixer_256_8").dim = 3


def test_model_info_with_a_tag_holds_those_weights():
    assert [w.tag for w in convmixer.model_info("convmixer_768_32.in1k").weights] == ["in1k"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("convmixer_256_9", "unknown model 'convmixer_256_9'; did you mean convmixer_256_8"),
        ("zzz", "unknown model 'zzz'; valid: convmixer_1024_12, "),
        ("timm/convmixer_768_32.in1k", "for a repository of the Hub give hf-hub:timm/convmixer_768_32.in1k"),
        ("convmixer_768_32.in22k", "convmixer_768_32 has no weights 'in22k'; valid: convmixer_768_32.in1k"),
        ("convmixer_512_12.in1k", "convmixer_512_12 has no weights 'in1k'; No public weights are known"),
    ],
)
def test_unknown_names(name, text):
    with pytest.raises(UnknownModelError, match=re.escape(text)):
        convmixer.model_info(name)
