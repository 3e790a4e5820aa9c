"""The public surface, pinned; and what importing the package may and may not do."""

import ast
import inspect
import sys
from pathlib import Path

from processes import finish

import convmixer

PACKAGE = Path(convmixer.__file__).parent
# By the longest name that a module's begins with: a room has one floor, or each of its modules has its own.
FLOORS = {"errors": 0, "hardware": 0, "ops": 0, "registry": 0, "runtime.cuda_graphs": 0, "tracing": 0, "wrappers": 0}
FLOORS |= {"data.images": 1, "hub.foreign": 1, "hub.untrusted": 1, "model": 1, "runtime.openvino_core": 1}
FLOORS |= {"transforms": 1}
FLOORS |= {"data": 2, "hub.checkpoints": 2, "hub.client": 2, "hub.config": 2, "runtime.folding": 2}
FLOORS |= {"factory": 3, "native": 3}
FLOORS |= {"inference": 4, "plots": 4, "runtime": 4, "training": 4}
FLOORS |= {"evaluation": 5, "hub.publish": 5, "runtime.benchmark": 5}
FLOORS |= {"hub.convert": 6, "cli": 7, "__main__": 8, "__init__": 8}
# They share a floor; a cycle among them fails at import.
NEIGHBOURS = ("inference", "plots", "runtime", "training")


def test_exported_names():
    names = [
        "ConvMixer",
        "ConvMixerError",
        "accelerate",
        "convert_checkpoint",
        "create_model",
        "create_transform",
        "export_model",
        "list_models",
        "list_pretrained",
        "load_checkpoint",
        "model_info",
        "optimize",
        "predict",
        "push_to_hub",
        "save_pretrained",
    ]
    assert names == convmixer.__all__ == sorted(names)
    assert all(hasattr(convmixer, name) for name in convmixer.__all__)


def test_signature_of_create_model():
    parameters = inspect.signature(convmixer.create_model).parameters
    assert list(parameters) == [
        "name",
        "pretrained",
        "device",
        "dtype",
        "channels_last",
        "fused",
        "checkpoint",
        "revision",
        "cache_dir",
        "token",
        "local_files_only",
        "model_args",
    ]
    assert parameters["device"].kind is inspect.Parameter.KEYWORD_ONLY


def test_every_public_object_has_a_docstring():
    assert all(inspect.getdoc(getattr(convmixer, name)) for name in convmixer.__all__)


def _imports(path: Path) -> set[str]:
    """What a module imports when it runs, in functions too."""
    names: set[str] = set()
    nodes: list[ast.AST] = [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            nodes += ast.iter_child_nodes(node)
    return names


def _floor(module: str) -> str | None:
    """The name in FLOORS under which a module is, without the package's own; None for a name that is no module's."""
    parts = module.split(".")
    names = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((name for name in names if name in FLOORS), None)


def test_imports_go_down_the_floors():
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if len(parts) > 1 and parts[-1] == "__init__":
            parts = parts[:-1]
        module = _floor(".".join(parts))
        if module is None:  # a room's docstring, where each module has a floor of its own
            assert not _imports(path), path
            continue
        for name in _imports(path):
            other = _floor(name.removeprefix("convmixer.")) if name.startswith("convmixer.") else None
            if other and other != module:
                below = FLOORS[other] < FLOORS[module]
                beside = FLOORS[other] == FLOORS[module] and other in ("errors", "registry", *NEIGHBOURS)
                assert below or beside, f"{path.name} imports {name}"


def test_registry_needs_only_the_standard_library():
    outside = {name.split(".")[0] for name in _imports(PACKAGE / "registry.py")} - {"convmixer"}
    assert outside <= set(sys.stdlib_module_names)
    assert {n for n in _imports(PACKAGE / "registry.py") if n.startswith("convmixer")} <= {
        "convmixer.errors", "convmixer.errors.UnknownModelError", "convmixer.errors.nearest"
    }  # fmt: skip


def test_only_hub_imports_huggingface_hub():
    users = {p.name for p in PACKAGE.rglob("*.py") if any(n.startswith("huggingface_hub") for n in _imports(p))}
    assert users == {"client.py"}


def test_import_prints_nothing_changes_no_environment_and_needs_no_extra():
    optional = ("accelerate", "captum", "datasets", "matplotlib", "nncf", "onnx", "onnxruntime", "openvino")
    code = (
        "import os, sys, torch, timm;"
        "state = lambda: (dict(os.environ), torch.get_num_threads(), torch.initial_seed());"
        "before = state();"
        "import convmixer, convmixer.cli;"
        "assert before == state();"
        f"assert not sys.modules.keys() & {set(optional)}"
    )
    run = finish([sys.executable, "-W", "error::UserWarning", "-c", code])
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
