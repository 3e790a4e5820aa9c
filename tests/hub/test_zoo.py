"""The zoo on the Hub: published once, found again, finished after faults, and loaded by a package without weights."""

import dataclasses
import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from command import run as cli
from hub_server import READER, WRITER, Fault, run_client, serve
from huggingface_hub import ModelCard, parse_eval_result_entries
from PIL import Image

import convmixer
from convmixer import registry
from convmixer.errors import ArgumentError, DataError, WeightsError
from convmixer.hub import publish, verify, zoo

ROOT = Path(__file__).parents[2]
SHIPPED = {f"{v.name}.{w.tag}": w for v in registry.VARIANTS for w in v.weights if w.path}
NAMES = list(SHIPPED)

STRANGER = "hf_StrangerStranger"

# All pushes in one process, which imports everything once; what they read of this computer is read once, too.
CLIENT = f"""
import functools, json, os, sys, time, urllib.error, urllib.request
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from command import RUNNER
from convmixer.cli import main
from convmixer.hub import verify, zoo

zoo._files_of_run, zoo.gather = functools.cache(zoo._files_of_run), functools.cache(zoo.gather)
time.sleep = lambda seconds: None

def push(case, *arguments, libraries=()):
    verify.LIBRARIES = {{name: verify.with_timm for name in libraries}}
    try:
        urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/begin/" + case.replace(" ", "_"))
    except urllib.error.HTTPError as error:
        error.close()
    result = RUNNER.invoke(main, ["push-zoo", *arguments])
    print(json.dumps({{"case": case, "status": result.exit_code, "out": result.stdout, "err": result.stderr}}))

push("dry", "me", "--dry-run")
push("first", "me", "--json", libraries=["timm"])
push("second", "me")
push("dry again", "me", "--dry-run")
push("cut", "broken", "--private")
push("after the cut", "broken", "--private")
push("lost", "lossy")
push("after the loss", "lossy")
push("limit", "limited", "--json")
push("other", "gardener")
push("other architecture", "namesake")
os.environ["HF_TOKEN"] = {STRANGER!r}
push("stranger", "strange")
os.environ["HF_TOKEN"] = {READER!r}
push("reader", "read")
"""
LIMITED = (
    "GET /api/models/limited/",
    "POST /api/repos/create",
    f"POST /api/models/limited/{NAMES[0]}/commit/",
    "POST /api/collections",
)


@pytest.fixture(scope="module", params=[pytest.param("a server", marks=pytest.mark.slow)])
def pushed(tmp_path_factory):
    """The server after all pushes; by case, requests that could change something, and what the command printed."""
    with serve() as hub:
        hub.faults.append(Fault(f"POST /api/models/broken/{NAMES[1]}/commit/", "drop"))
        hub.faults.append(Fault(f"POST /api/models/lossy/{NAMES[1]}/commit/", "lost"))
        hub.add(f"gardener/{NAMES[2]}", {".gitattributes": b"", "README.md": b"# Flowers\n", "flowers.bin": b"x"})
        card = f"---\n{{}}\n---\n{zoo.BEGIN}".encode()
        hub.add(f"namesake/{NAMES[2]}", {"README.md": card, "config.json": b'{"architecture": "convmixer_768_32"}'})
        hub.later = {"GET /begin/limit": [Fault(match, 429, 2, "3") for match in LIMITED]}
        lines = run_client(CLIENT, tmp_path_factory.mktemp("home"), hub.endpoint, HF_TOKEN=WRITER)
        records = {record["case"]: record for record in map(json.loads, lines)}
        writes, case = {}, ""
        for request in hub.requests:
            if request.startswith("GET /begin/"):
                case = request.removeprefix("GET /begin/").replace("_", " ")
                writes[case] = []
            elif request.startswith(("POST", "PUT")) and "yaml" not in request:
                writes[case].append(request)
        yield hub, writes, records


def test_a_dry_run_changes_nothing_and_says_what_would(pushed):
    _, writes, records = pushed
    assert writes["dry"] == []
    out = records["dry"]["out"]
    for name in NAMES:
        (line,) = [line for line in out.splitlines() if line.startswith(f"me/{name}: ")]
        assert line.startswith(f"me/{name}: would commit .eval_results/cifar10.yaml, README.md, config.json, ")
    assert f"collection to be made: would add {', '.join(f'me/{name}' for name in NAMES)}" in out
    assert "dry run: nothing was uploaded" in records["dry"]["err"]
    assert "revision=" not in out  # nobody knows it yet


def test_the_repositories(pushed):
    hub, _, records = pushed
    assert records["first"]["status"] == 0, records["first"]["err"]
    for name, weights in SHIPPED.items():
        repository = hub.repositories[f"me/{name}"]
        assert repository.messages == ["", f"{name}, written by convmixer"]
        files = repository.files()
        by_script = (ROOT / "docs" / "runs" / name / "job.json").exists()
        described = {"job.json", "losses.csv"} if by_script else {"recipe.json", "metrics.csv"}
        assert set(files) == described | {
            *(".gitattributes", "README.md", "config.json", "model.safetensors", "evaluation.json"),
            *(".eval_results/cifar10.yaml", "plots/history.png"),
        }
        assert files["model.safetensors"] == weights.path.read_bytes()  # so that one sha256 holds for both
        for path in described | {"evaluation.json"}:
            assert files[path] == (ROOT / "docs" / "runs" / name / path).read_bytes()
        card = ModelCard(files["README.md"].decode())
        assert card.data.datasets == ["uoft-cs/cifar10"]
        assert [r.metric_value for r in card.data.eval_results] == [m.value for m in weights.metrics]
        for path in re.findall(r"\]\(([^)#]+)\)", card.text):
            assert "://" in path or path in files


def test_eval_results_have_the_form_of_the_hub(pushed):
    hub, _, _ = pushed
    for name, weights in SHIPPED.items():
        content = yaml.safe_load(hub.repositories[f"me/{name}"].files()[".eval_results/cifar10.yaml"])
        (entry,) = parse_eval_result_entries(content)
        assert (entry.dataset_id, entry.value) == ("uoft-cs/cifar10", weights.metrics[0].value)
        assert entry.source_url == f"{hub.endpoint}/me/{name}/blob/main/evaluation.json"
        assert "CIFAR-10 test (10,000 images)" in entry.notes
        evaluation = json.loads((ROOT / "docs" / "runs" / name / "evaluation.json").read_text())
        assert evaluation["precisions"]["float32"]["top1"] == entry.value


def test_the_collection(pushed):
    hub, _, records = pushed
    (collection,) = [c for c in hub.collections.values() if c["namespace"] == "me"]
    assert collection["title"] == "ConvMixer"
    assert len(collection["description"]) <= 150
    assert [item["id"] for item in collection["items"]] == [f"me/{name}" for name in NAMES]
    assert json.loads(records["first"]["out"])["collection"] == f"{hub.endpoint}/collections/{collection['slug']}"


def test_a_second_push_changes_nothing(pushed):
    _, writes, records = pushed
    for again in "second", "dry again":
        assert writes[again] == []  # not even a request that could
        out = records[again]["out"]
        assert all(f"me/{name}: unchanged" in out for name in NAMES)
        assert re.search(r"^collection http\S+: unchanged$", out, re.MULTILINE)


def test_records(pushed):
    """The fields to paste: the same as JSON and as text, with the commit that holds the file of that sha256."""
    hub, _, records = pushed
    for entry in json.loads(records["first"]["out"])["entries"]:
        content = hub.repositories[entry["hub_id"]].files(entry["revision"])["model.safetensors"]
        assert hashlib.sha256(content).hexdigest() == entry["sha256"] == SHIPPED[entry["name"]].sha256
        assert len(content) == entry["size"]
        fields = (f'hub_id="{entry["hub_id"]}",\nrevision="{entry["revision"]}",\nsha256="{entry["sha256"]}",\n'
                  f"size={entry['size']},\n")  # fmt: skip
        assert f"# {entry['name']}\n{fields}" in records["second"]["out"] == records["dry again"]["out"]


# ---- a package without weights --------------------------------------------------------------------------------------

LOAD = """
import json, sys
sys.path.insert(0, {folder!r})
from pathlib import Path
import convmixer, timm
from convmixer import registry
assert Path(convmixer.__file__).parents[1] == Path({folder!r}), convmixer.__file__
assert not list(registry.WEIGHTS_FOLDER.glob("*.safetensors"))

def show(case, make):
    try:
        found = convmixer.predict(make().eval(), {cat!r}, topk=1)[0]
    except convmixer.ConvMixerError as error:
        found = f"{{type(error).__name__}}: {{error}}"
    print(json.dumps({{"case": case, "found": found}}))

def load(case, name, **options):
    show(case, lambda: convmixer.create_model(name, pretrained=True, device="cpu", **options))

print(json.dumps({{"case": "source", "found": convmixer.model_info({first!r}).weights[0].source}}))
load("bare name", {first!r}.partition(".")[0])
load("full name", {first!r})
load("revision", {first!r}, revision="main")
"""
PASTED = """
show("timm", lambda: timm.create_model({first!r}, pretrained=True))
load("wrong", {second!r})
load("right", {second!r})
"""
PLAIN = """
from convmixer.hub.zoo import push_zoo
show("zoo", lambda: push_zoo("me"))
"""


@pytest.fixture(scope="module")
def without_weights(pushed, tmp_path_factory):
    """A copy of the package without its weights, and another with the pushed records pasted into its registry."""
    _, _, records = pushed
    folder = tmp_path_factory.mktemp("package without weights")
    for kind in "plain", "pasted":
        ignore = shutil.ignore_patterns("*.safetensors", "__pycache__")
        shutil.copytree(Path(convmixer.__file__).parent, folder / kind / "convmixer", ignore=ignore)
        (folder / kind / "convmixer" / "weights").mkdir(exist_ok=True)
    source = folder / "pasted" / "convmixer" / "registry.py"
    text = source.read_text()
    for entry in json.loads(records["first"]["out"])["entries"]:
        sha256 = f'sha256="{entry["sha256"]}",'
        assert text.count(sha256) == 1
        text = text.replace(sha256, f'hub_id="{entry["hub_id"]}", revision="{entry["revision"]}", {sha256}')
    source.write_text(text)
    return folder


def load_with(folder, program, home, endpoint, cat):
    names = {"folder": str(folder), "first": NAMES[0], "second": NAMES[1], "cat": str(cat)}
    lines = run_client((LOAD + program).format(**names), home, endpoint)
    return {record["case"]: record["found"] for record in map(json.loads, lines)}


def test_a_package_without_weights_takes_those_of_the_hub(pushed, without_weights, tmp_path, cat):
    """At the pinned commit, whatever the branch has later; other bytes of the same length are refused."""
    hub, _, _ = pushed
    first, second = (SHIPPED[name] for name in NAMES[:2])
    pinned = hub.repositories[f"me/{NAMES[0]}"].refs["main"]
    hub.add(f"me/{NAMES[0]}", {"model.safetensors": b"later, and of another kind"})
    hub.faults.append(Fault(f"GET /objects/{second.sha256}", "wrong", 2))
    hub.requests.clear()
    found = load_with(without_weights / "pasted", PASTED, tmp_path, hub.endpoint, cat)
    model = convmixer.create_model(NAMES[0], pretrained=True, device="cpu").eval()
    label, probability = convmixer.predict(model, cat, topk=1)[0]
    for case in "bare name", "full name", "timm":
        assert found[case] == [label, pytest.approx(probability, rel=1e-5)]
    assert found["source"] == f"hf-hub:me/{NAMES[0]}/model.safetensors@{pinned}"
    assert "is not a whole safetensors file" in found["revision"]  # as asked for: what main has today
    assert len(hub.gets(f"/objects/{first.sha256}")) == 1
    assert found["wrong"].startswith(f"WeightsError: 'model.safetensors' of hf-hub:me/{NAMES[1]}@")
    assert f"expected {second.sha256}" in found["wrong"]
    assert found["right"][0] == "cat"


def test_without_weights_and_without_a_record(without_weights, tmp_path, cat):
    found = load_with(without_weights / "plain", PLAIN, tmp_path, "http://127.0.0.1:9", cat)
    for case in "bare name", "full name":
        assert found[case].startswith(
            f"WeightsError: {NAMES[0]} ships with the package, but '{SHIPPED[NAMES[0]].file}' is missing in "
        )
        assert "install the package again, or give the file as checkpoint=" in found[case]
    assert found["zoo"].startswith("WeightsError: no weights in ")


def test_the_packaged_file_comes_first(monkeypatch):
    """Also when the Hub has it; a revision means the Hub."""
    name = NAMES[0]
    asked = []
    monkeypatch.setattr(registry, "_BY_NAME", {k: v for k, v in registry._BY_NAME.items()})
    variant, weights = registry.get_variant(name)
    record = dataclasses.replace(weights, hub_id="me/x", revision="4f0c")
    registry._BY_NAME[variant.name] = dataclasses.replace(variant, weights=(record,))

    def fetch(*arguments, **options):
        asked.append((arguments, options["revision"], options.get("sha256", "")))
        return weights.path

    monkeypatch.setattr(publish.client, "fetch", fetch)
    convmixer.create_model(name, pretrained=True, device="cpu")
    assert (asked, convmixer.model_info(name).weights[0].source) == ([], "package")
    convmixer.create_model(name, pretrained=True, device="cpu", revision="v2")
    assert asked == [(("me/x", "model.safetensors"), "v2", "")]


# ---- faults ---------------------------------------------------------------------------------------------------------


def test_a_connection_that_breaks_in_the_middle(pushed):
    """The second repository is made, and its commit breaks: the same command finishes it and repeats nothing."""
    hub, writes, records = pushed
    cut, again = records["cut"], records["after the cut"]
    assert cut["status"] == 2
    assert f"error: hf-hub:broken/{NAMES[1]}: " in cut["err"]
    assert "1 of 3 repositories are as they should be; the same command finishes the rest" in cut["err"]
    assert again["status"] == 0, again["err"]
    assert f"broken/{NAMES[0]}: unchanged" in again["out"]
    assert not [request for request in writes["after the cut"] if f"broken/{NAMES[0]}" in request]
    for name in NAMES:
        repository = hub.repositories[f"broken/{name}"]
        assert repository.private
        assert repository.messages == ["", f"{name}, written by convmixer"]
    (collection,) = [c for c in hub.collections.values() if c["namespace"] == "broken"]
    assert len(collection["items"]) == 3
    assert collection["private"]


def test_a_lost_answer(pushed):
    """The commit was made, and nobody heard of it: the next call finds it there."""
    hub, _, records = pushed
    assert records["lost"]["status"] == 2
    assert f"error: hf-hub:lossy/{NAMES[1]}: " in records["lost"]["err"]
    assert records["after the loss"]["out"].count(f"lossy/{NAMES[1]}: unchanged") == 1
    assert [len(hub.repositories[f"lossy/{name}"].commits) for name in NAMES] == [2, 2, 2]


def test_a_rate_limit_is_waited_for(pushed):
    hub, _, records = pushed
    assert records["limit"]["status"] == 0, records["limit"]["err"]
    assert [fault.times for fault in hub.faults if fault.match in LIMITED] == [0] * len(LIMITED)
    for name in NAMES:
        assert hub.repositories[f"limited/{name}"].messages == ["", f"{name}, written by convmixer"]
    assert len([c for c in hub.collections.values() if c["namespace"] == "limited"]) == 1


@pytest.mark.parametrize(
    ("case", "repository", "token", "text"),
    [
        ("stranger", f"strange/{NAMES[0]}", STRANGER, "Log in with `hf auth login`, or set HF_TOKEN, with a token"),
        ("reader", f"read/{NAMES[0]}", READER, f"The token may not write to read/{NAMES[0]}"),
    ],
)
def test_a_wrong_token(pushed, case, repository, token, text):
    hub, _, records = pushed
    assert records[case]["status"] == 2
    for part in (f"hf-hub:{repository}: ", text, "0 of 3 repositories"):
        assert part in records[case]["err"]
    assert token not in records[case]["err"] + records[case]["out"]
    owner = repository.partition("/")[0]
    assert not [name for name in [*hub.repositories, *hub.collections] if name.startswith(owner)]


@pytest.mark.parametrize(
    ("case", "owner", "files"),
    [
        ("other", "gardener", "README.md, flowers.bin"),
        ("other architecture", "namesake", "README.md, config.json"),  # with a card of ours
    ],
)
def test_a_repository_of_something_else(pushed, case, owner, files):
    """It is refused before any other is made."""
    hub, writes, records = pushed
    assert records[case]["status"] == 2
    assert f"{owner}/{NAMES[2]} exists and holds something other than {NAMES[2]} ({files})" in records[case]["err"]
    assert "rename or delete that repository, or give another owner" in records[case]["err"]
    assert writes[case] == []
    assert [name for name in hub.repositories if name.startswith(owner)] == [f"{owner}/{NAMES[2]}"]


# ---- arguments ------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(verify, "LIBRARIES", {})
    monkeypatch.setattr(publish.client.constants, "HF_HUB_OFFLINE", True)


def test_where_the_runs_are(quick, tmp_path, monkeypatch):
    with pytest.raises(ArgumentError, match=r"none' is not a folder: give runs= \(--runs\) the folder docs/runs"):
        zoo.push_zoo("me", runs=tmp_path / "none", dry_run=True)
    with pytest.raises(
        DataError, match=rf"{NAMES[0]}' does not describe the training of {NAMES[0]}: it needs recipe.json, metrics.csv"
    ):
        zoo.push_zoo("me", runs=tmp_path, dry_run=True)
    monkeypatch.setattr(zoo, "SOURCE_TREE", tmp_path / "site-packages" / "docs" / "runs")
    with pytest.raises(ArgumentError, match="the records of the trainings are not in the wheel: give runs="):
        zoo.push_zoo("me", dry_run=True)


def test_a_dry_run_without_a_network(quick):
    found = zoo.push_zoo("me", dry_run=True)
    assert [entry.revision for entry in found.entries] == [None] * len(NAMES)
    assert (found.collection, list(found.added)) == ("", [f"me/{name}" for name in NAMES])


def test_owner(quick):
    with pytest.raises(ArgumentError, match="give owner/name"):
        zoo.push_zoo("me/you", dry_run=True)
    assert "give owner/name" in cli("push-zoo", "a b", "--dry-run", status=2).stderr


def test_other_logits_are_not_published(quick, monkeypatch):
    def wrong(folder, x):
        return verify.with_timm(folder, x)[0] + 1, None

    monkeypatch.setattr(verify, "LIBRARIES", {"timm": wrong})
    with pytest.raises(WeightsError, match="timm opens what would be published, but its logits differ by"):
        zoo.push_zoo("me", dry_run=True)


def test_curves(tmp_path):
    """A point for each epoch that the history has."""
    for name in NAMES:
        folder = ROOT / "docs" / "runs" / name
        file = next(folder / path for path in ("metrics.csv", "losses.csv") if (folder / path).exists())
        rows = len(file.read_text().splitlines()) - 1
        figure = zoo.curves(folder)
        assert rows in [len(line.get_xdata()) for axes in figure.axes for line in axes.get_lines()]
        figure.savefig(tmp_path / "curves.png")
        with Image.open(tmp_path / "curves.png") as drawn:
            assert drawn.width > 500
