"""Loading from the Hub with its real client: what arrives, over which faults, and what the cache holds afterwards."""

import hashlib
import json

import pytest
import torch
from hub_server import READER, Fault, run_client, serve
from safetensors.torch import load_file

import convmixer

# The pauses are noted and skipped; a server that hangs is left after a fraction of a second.
CLIENT = """
import json, logging, os, time
import convmixer
from huggingface_hub import constants, file_download
from pathlib import Path

lines, pauses = [], []
class Log(logging.Handler):
    def emit(self, record):
        lines.append(record.getMessage())
for name in ("convmixer", "huggingface_hub"):
    logging.getLogger(name).handlers = [Log()]

def load(case, name=None, **options):
    lines.clear(), pauses.clear()
    record = {"case": case}
    try:
        model = convmixer.create_model(name or f"hf-hub:me/{case}", pretrained=True, device="cpu", **options)
        record["sum"] = model.head.weight.sum().item()
    except convmixer.ConvMixerError as error:
        record["error"] = f"{type(error).__name__}: {error}"
    record |= {"log": list(lines), "pauses": list(pauses)}
    os.write(1, json.dumps(record).encode() + b"\\n")

for number in range(8):
    if not os.fork():
        load(f"process {number}", "hf-hub:me/eight")
        os._exit(0)
for number in range(8):
    os.wait()

constants.HF_HUB_DOWNLOAD_TIMEOUT = constants.HF_HUB_ETAG_TIMEOUT = file_download._ETAG_RETRY_TIMEOUT = 0.4
time.sleep = pauses.append

def files(case):
    folder = Path(constants.HF_HUB_CACHE) / f"models--me--{case}"
    return [p for p in folder.rglob("*") if p.is_file() and p.parent.name not in ("refs", ".no_exist")]

def blob(case, of="model.safetensors"):
    return next(p for p in files(case) if p.name == of).resolve()
"""

ALWAYS = 99
FAULTS = {
    "fine": (),
    "cut": [("weights", "cut", 1)],
    "short": [("weights", "short", 1)],
    "less": [("weights", "less", 1)],
    "wrong": [("weights", "wrong", 1)],
    "wrong_always": [("weights", "wrong", ALWAYS)],
    "wrong_config": [("GET /me/wrong_config/resolve/main/config.json", "wrong", 1)],
    "busy": [("weights", 429, 1, "7")],
    "unavailable": [("weights", 503, 1, "3")],
    "failing": [("weights", 500, 2)],
    "failing_always": [("weights", 500, ALWAYS)],
    "no_head": [("HEAD /me/no_head", 500, 2)],
    "less_always": [("weights", "less", ALWAYS)],
    "hanging": [("weights", "hang", 1)],
    "hanging_always": [("weights", "hang", ALWAYS)],
    "hanging_head": [("HEAD /me/hanging_head", "hang", 1)],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model in the Hub's form."""
    torch.manual_seed(0)
    model = convmixer.create_model("convmixer_256_8", dim=16, depth=1, num_classes=3, device="cpu")
    return convmixer.save_pretrained(model, tmp_path_factory.mktemp("model") / "small", label_names=["a", "b", "c"])


@pytest.fixture(scope="module")
def results(folder, tmp_path_factory):
    """What the client met: records by case, the files of the cache, and the requests."""
    weights = (folder / "model.safetensors").read_bytes()
    with serve() as hub:
        for number, (case, faults) in enumerate(FAULTS.items()):
            # The space that pads the header makes each file another one of the same tensors.
            start = int.from_bytes(weights[:8], "little")
            own = (start + 8 * number).to_bytes(8, "little") + weights[8 : 8 + start] + b" " * 8 * number
            own += weights[8 + start :]
            hub.add(f"me/{case}", {"config.json": (folder / "config.json").read_bytes(), "model.safetensors": own})
            address = f"GET /objects/{hashlib.sha256(own).hexdigest()}"
            hub.faults += [Fault(address if match == "weights" else match, *rest) for match, *rest in faults]
        hub.add("me/secret", folder, private=True)
        hub.add("me/eight", folder)
        hub.faults.append(Fault(f"GET /objects/{hashlib.sha256(weights).hexdigest()}", "wrong", 1))
        code = (
            CLIENT
            + f"""
for case in {list(FAULTS)!r}:
    load(case)
    print(json.dumps({{"files": sorted(p.name for p in files(case)), "case": case}}))
load("again", "hf-hub:me/fine")
path = blob("fine")
content = path.read_bytes()
path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
load("corrupt_offline", "hf-hub:me/fine", local_files_only=True)
load("corrupt", "hf-hub:me/fine")
blob("fine").write_bytes(content[:-9])
load("cut_in_cache", "hf-hub:me/fine")
load("no_token", "hf-hub:me/secret")
load("secret", token={READER!r})
load("secret_revision", "hf-hub:me/secret@nowhere", token={READER!r})
load("bad_token", "hf-hub:me/secret", token="hf_bad\\nTokenToken")
"""
        )
        records = [json.loads(line) for line in run_client(code, tmp_path_factory.mktemp("home"), hub.endpoint)]
    cache = {r["case"]: r["files"] for r in records if "files" in r}
    return {r["case"]: r for r in records if "log" in r}, cache, hub.requests


@pytest.fixture(scope="module")
def expected(folder):
    return load_file(folder / "model.safetensors")["head.weight"].sum().item()


@pytest.mark.parametrize(
    "case",
    [
        *("fine", "cut", "short", "less", "wrong", "wrong_config", "busy", "unavailable", "failing", "no_head"),
        *("hanging", "hanging_head", "again", "corrupt", "cut_in_cache", "secret"),
    ],
)
def test_success(results, expected, case):
    record = results[0][case]
    assert record.get("error") is None
    assert record["sum"] == expected
    if case in results[1]:
        assert [
            f for f in results[1][case] if not f.endswith((".json", ".safetensors")) and len(f) not in (40, 64)
        ] == []


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("wrong_always", "'model.safetensors' of hf-hub:me/wrong_always"),
        ("wrong_always", "arrived corrupt twice: its hash is "),
        ("wrong_always", "Try later, or another endpoint (HF_ENDPOINT is http://127.0.0.1"),
        ("failing_always", "500"),
        ("less_always", "Consistency check failed"),
        ("hanging_always", "timed out"),
        ("no_token", "cannot get 'config.json' of hf-hub:me/secret: 401"),
        ("secret_revision", "Invalid rev id: nowhere"),
        ("corrupt_offline", "is corrupt: its hash is "),
        ("corrupt_offline", "hf download me/fine model.safetensors --revision "),
    ],
)
def test_error(results, case, text):
    record = results[0][case]
    assert "sum" not in record
    assert record["error"].startswith("WeightsError: ")
    assert text in record["error"]


@pytest.mark.parametrize("case", ["wrong_always", "failing_always", "less_always", "hanging_always"])
def test_nothing_partial_is_left(results, case):
    assert [name for name in results[1][case] if len(name) != 40] == ["config.json"]


def test_pauses(results):
    records = results[0]
    assert records["failing"]["pauses"] == [1, 2]
    assert records["unavailable"]["pauses"] == [3]
    assert 7 <= sum(records["busy"]["pauses"]) <= 8  # the client adds a second
    assert records["failing_always"]["pauses"] == [1, 2, 4, 8]
    assert records["fine"]["pauses"] == records["wrong"]["pauses"] == []


def test_corrupt_files_are_named_and_fetched_once(results):
    for case in "wrong", "wrong_config", "corrupt", "cut_in_cache":
        (line,) = [line for line in results[0][case]["log"] if "corrupt" in line]
        assert "models--me--" in line
        assert line.endswith("Fetching it once again")
    assert results[0]["again"]["log"] == []


def test_no_token_in_a_message(results):
    assert "error" in results[0]["bad_token"]
    assert "TokenToken" not in json.dumps(results[0])


def test_eight_processes_at_once(results, expected):
    assert [results[0][f"process {i}"]["sum"] for i in range(8)] == [expected] * 8


# ---- no network -----------------------------------------------------------------------------------------------------

NO_NETWORK = """
import socket
asked = []
def fail(*arguments, **options):
    asked.append(arguments[0])
    raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

def attempt(*arguments, **options):
    asked.clear()
    load(*arguments, **options)
    print(json.dumps({"asked": list(asked), "case": arguments[0]}))
"""


def test_a_name_that_does_not_resolve(folder, expected, tmp_path):
    """It is final after two tries, in one error and without a line of the client; what is in the cache is taken."""
    with serve() as hub:
        hub.add("me/cached", folder)
        code = (
            CLIENT.replace("for number in range(8)", "for number in ()")
            + NO_NETWORK
            + """
load("cached")
resolve, socket.getaddrinfo = socket.getaddrinfo, fail
attempt("missing", local_files_only=False)
attempt("cached")
socket.getaddrinfo = lambda *a, **o: fail(*a) if len(asked) < 1 else resolve(*a, **o)
attempt("second_try", "hf-hub:me/cached")
os.environ["http_proxy"] = "http://127.0.0.1:9"
os.environ["no_proxy"] = os.environ["NO_PROXY"] = ""
socket.getaddrinfo = fail
from convmixer.hub import client
print(json.dumps({"asked": [client._unresolved_host()], "case": "proxy"}))
"""
        )
        records = [json.loads(line) for line in run_client(code, tmp_path, hub.endpoint)]
    results = {r["case"]: r for r in records if "log" in r}
    asked = {r["case"]: r["asked"] for r in records if "asked" in r}

    missing = results["missing"]
    assert missing["error"].startswith(
        "WeightsError: cannot get 'config.json' of hf-hub:me/missing: the name '127.0.0.1' does not resolve"
    )
    assert "Where there is a network, run: hf download me/missing config.json. Copy the cache (" in missing["error"]
    assert "HF_HUB_OFFLINE=1" in missing["error"]
    assert asked["missing"] == ["127.0.0.1"] * 2
    assert (missing["log"], sum(missing["pauses"])) == ([], 1)

    assert results["cached"]["sum"] == results["second_try"]["sum"] == expected
    assert all("does not resolve: taking the cached copy of" in line for line in results["cached"]["log"])
    assert len(results["cached"]["log"]) == 2
    assert results["second_try"]["log"] == []
    assert asked["proxy"] == [""]


# ---- a cached file and a Hub that does not answer -------------------------------------------------------------------

NEWER = """
import logging, sys, time
import convmixer
time.sleep = lambda _: None
logging.basicConfig(stream=sys.stdout, format="%(message)s")
print(convmixer.create_model("hf-hub:me/m", pretrained=True, device="cpu").head.weight.sum().item())
"""


@pytest.fixture(scope="module")
def newer(tmp_path_factory):
    """Another model of the same sizes in the Hub's form, and the sum of its head."""
    torch.manual_seed(1)
    model = convmixer.create_model("convmixer_256_8", dim=16, depth=1, num_classes=3, device="cpu")
    return convmixer.save_pretrained(model, tmp_path_factory.mktemp("newer") / "small"), model.head.weight.sum().item()


@pytest.mark.parametrize(("fault", "times"), [(503, 1), (500, 2), (429, 1)])
def test_a_cached_file_is_not_taken_for_the_newest_where_the_hub_fails_once(folder, newer, tmp_path, fault, times):
    with serve() as hub:
        hub.add("me/m", folder)
        run_client(NEWER, tmp_path, hub.endpoint)
        hub.add("me/m", newer[0])
        hub.faults.append(Fault("HEAD /me/m", fault, times, "1"))
        assert float(run_client(NEWER, tmp_path, hub.endpoint)[-1]) == newer[1]


@pytest.mark.parametrize("links", ["", "1"])
@pytest.mark.parametrize("fault", [500, "hang"])
def test_a_cached_file_is_taken_with_a_warning_where_the_hub_goes_on_failing(
    folder, newer, expected, tmp_path, fault, links
):
    options = {"HF_HUB_ETAG_TIMEOUT": "1"} | ({"HF_HUB_DISABLE_SYMLINKS": links} if links else {})
    with serve() as hub:
        hub.add("me/m", folder)
        run_client(NEWER, tmp_path, hub.endpoint, **options)
        hub.add("me/m", newer[0])
        hub.faults.append(Fault("HEAD /me/m", fault, ALWAYS))
        lines = run_client(NEWER, tmp_path, hub.endpoint, **options)
        assert float(lines[-1]) == expected
        (said,) = [line for line in lines if "The cached copy may not be the newest" in line]
        assert said.startswith("cannot ask for 'config.json' of hf-hub:me/m: ")


def test_a_file_is_asked_for_once_where_the_cached_one_is_the_newest(folder, tmp_path):
    with serve() as hub:
        hub.add("me/m", folder)
        run_client(NEWER, tmp_path, hub.endpoint)
        hub.requests.clear()
        run_client(NEWER, tmp_path, hub.endpoint)
        assert hub.requests == ["HEAD /me/m/resolve/main/config.json"]


@pytest.mark.parametrize("times", [1, ALWAYS])
def test_a_cache_without_links(folder, expected, tmp_path, times):
    """As on Windows: nothing in the cache says the hash, so the Hub is asked for it."""
    weights = (folder / "model.safetensors").read_bytes()
    with serve() as hub:
        hub.add("me/m", folder)
        hub.faults.append(Fault(f"GET /objects/{hashlib.sha256(weights).hexdigest()}", "wrong", times))
        options = {"HF_HUB_DISABLE_SYMLINKS": "1"}
        if times == 1:
            assert float(run_client(NEWER, tmp_path, hub.endpoint, **options)[-1]) == expected
        else:
            code = (
                NEWER.replace("print(", "try:\n    print(") + "except convmixer.ConvMixerError as error: print(error)"
            )
            assert "arrived corrupt twice: its hash is" in run_client(code, tmp_path, hub.endpoint, **options)[-1]
