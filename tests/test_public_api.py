"""The public surface, pinned; and what importing the package may and may not do."""

import ast
import inspect
import sys
from pathlib import Path

from processes import finish

import convmixer

PACKAGE = Path(convmixer.__file__).parent


def test_exported_names():
    names = [
        "ConvMixer",
        "ConvMixerError",
        "FeaturePyramid",
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
        "predict_dataset",
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


def test_registry_needs_only_the_standard_library():
    outside = {name.split(".")[0] for name in _imports(PACKAGE / "registry.py")} - {"convmixer"}
    assert outside <= set(sys.stdlib_module_names)
    assert {n for n in _imports(PACKAGE / "registry.py") if n.startswith("convmixer")} <= {
        "convmixer.errors", *(f"convmixer.errors.{name}" for name in ("ArgumentError", "UnknownModelError", "nearest"))
    }  # fmt: skip


def test_only_hub_imports_huggingface_hub():
    users = {p.name for p in PACKAGE.rglob("*.py") if any(n.startswith("huggingface_hub") for n in _imports(p))}
    assert users == {"client.py", "card.py"}


def test_import_prints_nothing_changes_no_environment_and_needs_no_extra():
    optional = ("accelerate", "captum", "datasets", "matplotlib", "nncf", "onnx", "onnxruntime", "openvino")
    optional += ("pyarrow", "ray")
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
