"""Hostile files: mutated headers and configs bring a ConvMixerError or a model, in little time and memory.

A case that hangs is ended by an alarm. Memory is limited from outside: the process may map twice the file's size more
than it did before, and not a page beyond the allowance; what asks for more gets a MemoryError, which is no
ConvMixerError.
"""

import contextlib
import json
import random
import re
import signal
import struct
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import finish

import convmixer
from convmixer.errors import ConvMixerError, WeightsError
from convmixer.hub.checkpoints import save_weights
from convmixer.hub.json_limits import json_excess
from convmixer.inference import known_labels

resource = pytest.importorskip("resource", reason="memory cannot be limited here")
if not Path("/proc/self/statm").exists():
    pytest.skip("memory in use cannot be read here", allow_module_level=True)

NAME = "convmixer_256_8"
SECONDS = 60  # a case takes milliseconds; the rest is for a busy machine
ALLOWANCE = 32 * 2**20  # bytes: pools that the allocators and the interpreter take in large steps
HUGE = [0, -1, 1, 2, 7, 255, 10**6, 10**9, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 2**64, 10**400]
ODD = [None, True, False, "", "x", "gelu", "\x1b[2J", "[red]", "\ud800", "../../etc/passwd", "os.system", "a" * 5000]
ODD += [*HUGE, 0.5, -0.5, 1e308, float("nan"), float("inf"), [], [[]], {}, {"a": 1}, [1, 2, 3], [10**9] * 3]
ODD += [[0] * 1000, ["a", "b"], [None], {"__class__": "os.system"}]


def _model():
    return convmixer.ConvMixer(16, 2, 3, 2, num_classes=4, act_layer="relu")


CONFIG = {
    "architecture": NAME,
    "num_classes": 4,
    "label_names": ["a", "b", "c", "d"],
    "label_descriptions": {"a": "first"},
    "model_args": {"dim": 16, "depth": 2, "kernel_size": 3, "patch_size": 2, "in_chans": 3, "act_layer": "relu"},
    "pretrained_cfg": {
        "input_size": [3, 24, 24],
        "mean": [0.5, 0.5, 0.5],
        "std": [0.2, 0.2, 0.2],
        "crop_pct": 0.9,
        "crop_mode": "center",
        "interpolation": "bicubic",
        "tag": "x",
        "license": "mit",
    },
}
FURTHER = {
    "model_args": ["drop_rate", "global_pool", "num_classes", "block_drop_rate", "drop_path_rate", "device", "width"],
    "pretrained_cfg": ["file", "url", "hf_hub_id", "custom_load", "state_dict", "num_classes", "test_input_size", "x"],
}


class Folder:
    """A good folder, whose two files the cases spoil."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.weights, self.config = path / "model.safetensors", path / "config.json"
        save_weights(_model(), self.weights, {"label_names": ["a", "b", "c", "d"], "input_size": [3, 24, 24]})
        content = self.weights.read_bytes()
        length = struct.unpack("<Q", content[:8])[0]
        self.header, self.data = json.loads(content[8 : 8 + length]), content[8 + length :]
        self.restore()
        self.target = _model()
        self.outcomes = {"loaded": 0, "refused": 0}

    def write_header(self, header, length=None):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        self.weights.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + self.data)

    def restore(self):
        self.write_header(self.header)
        self.config.write_text(json.dumps(CONFIG))

    def try_it(self):
        """Open the folder in every way; anything but a ConvMixerError goes through."""
        before = {key: tensor.clone() for key, tensor in self.target.state_dict().items()}

        def load():
            convmixer.load_checkpoint(self.target, self.weights)

        def build():
            model = convmixer.create_model(f"local-dir:{self.path}", pretrained=True, device="cpu")
            convmixer.create_transform(model)
            if model.num_classes:
                known_labels(model)
            assert sum(p.numel() for p in model.parameters()) < 10 * len(self.data)

        def checkpoint():
            convmixer.create_model(NAME, checkpoint=self.weights, device="cpu", dim=16, depth=2, kernel_size=3)

        with limits(2 * self.weights.stat().st_size), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of unknown keys
            for step in (load, build, checkpoint):
                try:
                    step()
                except ConvMixerError as error:
                    message = str(error)
                    if len(message) > 3000 or re.search("allocat|memory", message):  # the limit, in another guise
                        raise AssertionError(f"a message of {len(message)} characters: {message[:2000]}") from error
                    self.outcomes["refused"] += 1
                    if step is load:
                        after = self.target.state_dict()
                        assert all(torch.equal(after[key], before[key]) for key in before)
                else:
                    self.outcomes["loaded"] += 1


@contextlib.contextmanager
def limits(size):
    """An end to waiting and to taking memory."""

    def ring(*_):
        raise TimeoutError(f"more than {SECONDS} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    old = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + size + ALLOWANCE, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


# ---- seeded mutations -----------------------------------------------------------------------------------------------


def spoil_config(folder, rng):
    config = json.loads(json.dumps(CONFIG))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        part = rng.choice([None, "model_args", "pretrained_cfg"])
        inside = config if part is None else config.get(part)
        if not isinstance(inside, dict):
            continue
        key = rng.choice([*inside, *FURTHER.get(part, ["x"])])
        old = inside.get(key)
        if isinstance(old, list) and old and rng.random() < 0.5:
            old[rng.randrange(len(old))] = rng.choice(ODD)
        elif rng.random() < 0.15:
            inside.pop(key, None)
        else:
            inside[key] = rng.choice(ODD)
    text = json.dumps(config).encode("utf-8", "surrogatepass")
    if rng.random() < 0.2:
        text = spoil_bytes(text, rng)
    if rng.random() < 0.02:
        text = rng.choice([b"[" * 100_000, b'{"a":' * 50_000, b"9" * 5000, b"", b"\xff\xfe", b"\0" * 1000])
    folder.config.write_bytes(text)


def spoil_bytes(text, rng):
    changed = bytearray(text)
    for _ in range(rng.choice((1, 1, 3, 10))):
        if not changed:
            break
        place = rng.randrange(len(changed))
        kind = rng.randrange(4)
        if kind == 0:
            changed[place] = rng.randrange(256)
        elif kind == 1:
            del changed[place : place + rng.randrange(1, 20)]
        elif kind == 2:
            changed[place:place] = rng.randbytes(rng.randrange(1, 8))
        else:
            changed[place:place] = changed[place : place + rng.randrange(1, 40)]
    return bytes(changed)


DTYPES = [
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "I8",
    "U8",
    "BOOL",
    "F8_E4M3",
    "F8_E5M2",
    "F8_E8M0",
    "F4",
    "C64",
    "U64",
    "x",
]


def any_shape(entry, rng):
    entry["shape"] = [rng.choice(HUGE) for _ in range(rng.randrange(6))]


def another_first_size(entry, rng):
    entry["shape"] = [rng.choice(HUGE[:9]), *entry["shape"][1:]]


def an_empty_shape(entry, rng):
    """Nothing at all, in as many numbers as one likes."""
    entry["shape"] = [rng.choice(HUGE), 0, *entry["shape"][2:]]
    entry["data_offsets"] = [entry["data_offsets"][0]] * 2


def another_order(entry, rng):
    entry["shape"] = rng.sample(entry["shape"], len(entry["shape"]))


def another_dtype(entry, rng):
    entry["dtype"] = rng.choice(DTYPES)


def the_same_bytes_in_another_dtype(entry, rng):
    count = (entry["data_offsets"][1] - entry["data_offsets"][0]) // 4
    dtype, factor = rng.choice([("F16", 2), ("F8_E4M3", 4), ("F8_E8M0", 4), ("I32", 1), ("U8", 4), ("BOOL", 4)])
    entry |= {"dtype": dtype, "shape": rng.choice([[count * factor], [1, count * factor], entry["shape"]])}


def any_offsets(entry, rng):
    entry["data_offsets"] = [rng.choice(HUGE) for _ in range(rng.choice((0, 1, 2, 2, 2, 3)))]


def an_odd_field(entry, rng):
    entry[rng.choice(list(entry))] = rng.choice(ODD)


def rename(header, key, rng):
    names = ["x", "", "../x", "\x1b[2J", "a" * 5000, "stem.0", f"blocks.{rng.choice(HUGE)}.0.fn.0.weight"]
    header[rng.choice(names)] = header.pop(key)


def leave_out(header, key, rng):
    del header[key]


def move_a_block(header, key, rng):
    """Another block, or one less, with its bytes."""
    moved = {re.sub(r"^blocks\.1\.", f"blocks.{rng.choice(HUGE)}.", name): entry for name, entry in header.items()}
    header.clear()
    header.update(moved)


def in_entry(change):
    return lambda header, key, rng: change(header[key], rng)


SPOIL_KEY = [
    *map(
        in_entry,
        (
            any_shape,
            another_first_size,
            an_empty_shape,
            another_order,
            another_dtype,
            the_same_bytes_in_another_dtype,
            any_offsets,
            an_odd_field,
        ),
    ),
    rename,
    leave_out,
    move_a_block,
]


def spoil_metadata(header, rng):
    header["__metadata__"] = rng.choice(
        [*ODD, {"label_names": "[" * 50_000}, {"label_names": "[1]", "input_size": "9"}]
    )


def spoil_header(folder, rng):
    header = json.loads(json.dumps(folder.header))
    length = None
    for key in rng.sample(list(header), rng.choice((1, 1, 2, 4))):
        if key not in header:  # renamed by the change before
            continue
        spoil = rng.choice(SPOIL_KEY)
        if key == "__metadata__":
            spoil_metadata(header, rng)
        else:
            spoil(header, key, rng)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    if rng.random() < 0.2:
        text = spoil_bytes(text, rng)
    if rng.random() < 0.1:
        length = rng.choice([0, 1, len(text) - 1, len(text) + 1, 2**31, 2**63, 2**64 - 1])
    folder.write_header(text, length)
    if rng.random() < 0.05:
        content = folder.weights.read_bytes()
        folder.weights.write_bytes(content[: rng.randrange(len(content))])


def fuzz(path, cases, seed=0):
    """Run seeded cases; the outcomes by number."""
    folder = Folder(path)
    folder.try_it()
    assert folder.outcomes == {"loaded": 3, "refused": 0}  # the good one, and all libraries are warm
    for number in range(cases):
        rng = random.Random(f"{seed} {number}")
        folder.restore()
        (spoil_header if number % 2 else spoil_config)(folder, rng)
        if number % 10 == 9:
            spoil_config(folder, rng)
        try:
            folder.try_it()
        except BaseException as error:
            raise AssertionError(f"case {number} of seed {seed}; its files are in {path}") from error
    return folder.outcomes


def test_seeded_cases(tmp_path):
    outcomes = fuzz(tmp_path, 300)
    assert min(outcomes.values()) > 100  # neither everything nor nothing is let in


@pytest.mark.slow
def test_ten_thousand_cases(tmp_path):
    outcomes = fuzz(tmp_path, 10_000, seed=1)
    assert sum(outcomes.values()) == 3 * 10_001


# ---- hypothesis -----------------------------------------------------------------------------------------------------

QUICK = settings(
    max_examples=100,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(ODD),
    lambda inside: st.lists(inside, max_size=4) | st.dictionaries(st.text(), inside, max_size=4),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = Folder(tmp_path_factory.mktemp("fuzz"))
    folder.try_it()
    return folder


@QUICK
@given(data=st.data())
def test_any_json_in_a_config(folder, data):
    folder.restore()
    part = data.draw(st.sampled_from([None, "model_args", "pretrained_cfg"]))
    config = json.loads(json.dumps(CONFIG))
    inside = config if part is None else config[part]
    key = data.draw(st.sampled_from([*inside, *FURTHER.get(part, ["x"])]))
    inside[key] = data.draw(VALUES)
    folder.config.write_text(json.dumps(config))
    folder.try_it()


@QUICK
@given(data=st.data())
def test_any_json_in_a_header(folder, data):
    folder.restore()
    header = json.loads(json.dumps(folder.header))
    key = data.draw(st.sampled_from([*header, "x"]))
    part = data.draw(st.sampled_from([None, "dtype", "shape", "data_offsets"]))
    if part in header.get(key, {}):
        header[key][part] = data.draw(VALUES | st.lists(st.integers(-1, 2**64), max_size=5))
    else:
        header[key] = data.draw(VALUES)
    folder.write_header(header)
    folder.try_it()


# ---- much JSON ------------------------------------------------------------------------------------------------------

_MANY = {
    "tensors": b"{%s}" % b",".join(b'"%x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(60_000)),
    "sizes": b'{"a":{"dtype":"U8","shape":[%s],"data_offsets":[0,0]}}' % b",".join([b"0"] * 1_500_000),
    "metadata": b'{"__metadata__":{%s}}' % b",".join(b'"%x":""' % i for i in range(200_000)),
    "bytes": b" " * 5 * 2**20 + b"{}",
    "config": b'{"x":[%s]}' % b",".join([b"{}"] * 1_000_000),
    "config of bytes": b" " * 5 * 2**20 + b"{}",
}


@pytest.mark.parametrize("case", _MANY)
def test_much_json_is_not_parsed(folder, case):
    """It takes up to a hundred times its size in memory."""
    folder.restore()
    if case.startswith("config"):
        folder.config.write_bytes(_MANY[case])
    else:
        folder.write_header(_MANY[case])
    folder.try_it()
    with pytest.raises(WeightsError, match=r"has (a header of )?more than (4,194,304 bytes|100,000 values) of JSON"):
        convmixer.create_model(f"local-dir:{folder.path}", pretrained=True, device="cpu")


def test_many_labels_are_not_parsed(folder):
    folder.restore()
    header = json.loads(json.dumps(folder.header))
    header["__metadata__"]["label_names"] = json.dumps([[]] * 300_000)
    folder.write_header(header)
    folder.try_it()
    with pytest.raises(WeightsError, match=r"label_names in the header of .* has more than 100,000 values"):
        convmixer.create_model(NAME, checkpoint=folder.weights, device="cpu", dim=16, depth=2, kernel_size=3)


def test_values_are_counted_outside_of_strings():
    most = b'"a\\",,\\\\",' * 99_999 + b"1"
    assert json_excess(b"[%s]" % most) == ""
    assert json_excess(b"[%s,1]" % most) == "more than 100,000 values of JSON"
    assert json_excess(b'["%s' % (b"," * 3_000_000)) == ""


# ---- files of real size ---------------------------------------------------------------------------------------------

PEAKS = """
import ctypes, gc, json, sys
from pathlib import Path
import convmixer

def status(key):
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.split(f"{key}:")[1].split()[0])

def build(source, weights):
    options = {"checkpoint": weights} if weights else {"pretrained": True}
    return convmixer.create_model(source, device="cpu", **options)

build("convmixer_256_8", None)  # what is taken once is taken now
for case, source, weights in json.loads(sys.argv[1]):
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is in use
    before, outcome = status("VmRSS"), "loaded"
    try:
        model = build(source, weights)
        model = None
    except convmixer.ConvMixerError as error:
        outcome = str(error)
    print(json.dumps([case, status("VmHWM") - before, outcome]))
"""


def peaks(cases):
    """Growth of the peak of resident memory, in bytes, and what came of it, by case; in a process of its own."""
    command = [sys.executable, "-c", PEAKS, json.dumps([[name, source, str(w or "")] for name, source, w in cases])]
    done = finish(command)
    done.check_returncode()
    return {case: (growth, outcome) for case, growth, outcome in map(json.loads, done.stdout.splitlines())}


def write_folder(path, weights, config):
    path.mkdir()
    (path / "model.safetensors").write_bytes(weights)
    (path / "config.json").write_bytes(config)
    return path


def with_header(header, data):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.slow
def test_memory_of_a_large_file(tmp_path):
    """The largest variant, 85 MB, good and spoilt, as a file and in a folder: less than twice the file's size."""
    name = "convmixer_768_32"
    model = convmixer.create_model(name, device="cpu")
    good = convmixer.save_pretrained(model, tmp_path / "good")
    content, config = ((good / file).read_bytes() for file in ("model.safetensors", "config.json"))
    start = 8 + int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8:start]), content[start:]
    # A weight as wide as the header likes; and all bytes as numbers of one byte, which would be four times as wide.
    huge = json.loads(json.dumps(header))
    huge["head.weight"]["shape"][0] = 10**9
    eighth = json.loads(json.dumps(header))
    for entry in eighth.values():
        if entry.get("dtype") == "F32":
            entry |= {"dtype": "F8_E4M3", "shape": [4 * entry["shape"][0], *entry["shape"][1:]]}
    spoilt = {
        "cut": (content[:-1], "is not a whole safetensors file"),
        "a header of 2^63 bytes": (struct.pack("<Q", 2**63) + content[8:], "is not a whole safetensors file"),
        "a dim of 10^9": (with_header(huge, data), "is not a whole safetensors file"),
        "of one byte": (with_header(eighth, data), "not"),
        "not finite": (content[:start] + b"\xff" * len(data), "values that are not finite"),
    }
    good_cases = {"good": (name, good / "model.safetensors"), "good, in a folder": (f"local-dir:{good}", None)}
    cases = [(case, *given) for case, given in good_cases.items()]
    for case, (text, _) in spoilt.items():
        folder = write_folder(tmp_path / case, text, config)
        cases += [(case, name, folder / "model.safetensors"), (f"{case}, in a folder", f"local-dir:{folder}", None)]
    half = tmp_path / "half.safetensors"
    save_weights(model.half(), half)
    found = peaks([*cases, ("half", name, half)])
    for case, (growth, outcome) in found.items():
        assert growth < 2 * len(content), case  # of half precision, too: the model has float32
        text = spoilt.get(case.removesuffix(", in a folder"), ("", "loaded"))[1]
        assert text in outcome, case
    assert len(found) == 2 * len(spoilt) + 3
