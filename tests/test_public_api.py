"""The public surface, pinned; and what importing the package may and may not do."""

import ast
import inspect
import sys
from pathlib import Path

from processes import finish

import convmixer

PACKAGE = Path(convmixer.__file__).parent
FLOORS = {"errors": 0, "hardware": 0, "registry": 0, "wrappers": 0, "tracing": 0, "cuda_graphs": 0, "ops": 0}
FLOORS |= {"compiled_code": 1, "foreign": 1, "images": 1, "model": 1, "openvino_core": 1, "transforms": 1}
FLOORS |= {"untrusted": 1}
FLOORS |= {"checkpoints": 2, "config": 2, "folding": 2, "hub": 2, "factory": 3, "native": 3}
FLOORS |= {"backends": 4, "export": 4, "inference": 4, "plots": 4, "training": 4}
FLOORS |= {"benchmark": 5, "evaluation": 5, "publishing": 5, "convert": 6, "cli": 7, "__main__": 8, "__init__": 8}
NEIGHBOURS = ("backends", "export", "inference", "plots", "training")  # one floor; a cycle among them fails at import


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
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_imports_go_down_the_floors():
    for path in PACKAGE.rglob("*.py"):
        module = path.relative_to(PACKAGE).with_suffix("").parts[0]
        for name in _imports(path):
            parts = name.split(".")
            if parts[0] == "convmixer" and len(parts) > 1 and parts[1] in FLOORS and parts[1] != module:
                below = FLOORS[parts[1]] < FLOORS[module]
                beside = FLOORS[parts[1]] == FLOORS[module] and parts[1] in ("errors", "registry", *NEIGHBOURS)
                assert below or beside, f"{path.name} imports {name}"


def test_registry_needs_only_the_standard_library():
    outside = {name.split(".")[0] for name in _imports(PACKAGE / "registry.py")} - {"convmixer"}
    assert outside <= set(sys.stdlib_module_names)
    assert {n for n in _imports(PACKAGE / "registry.py") if n.startswith("convmixer")} <= {
        "convmixer.errors", "convmixer.errors.UnknownModelError", "convmixer.errors.nearest"
    }  # fmt: skip


def test_only_hub_imports_huggingface_hub():
    users = {p.name for p in PACKAGE.rglob("*.py") if any(n.startswith("huggingface_hub") for n in _imports(p))}
    assert users == {"hub.py"}


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
