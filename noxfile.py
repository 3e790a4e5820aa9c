"""The versions that `pyproject.toml` allows, each in an environment of its own: `nox --list`, `nox -s "torch(2.9)"`."""

import nox

nox.needs_version = ">=2024.10.9"
nox.options.default_venv_backend = "uv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["newest", "torch"]

# Each minor version of torch and the torchvision that was made for it.
TORCH = {
    "2.7": "0.22",
    "2.8": "0.23",
    "2.9": "0.24",
    "2.10": "0.25",
    "2.11": "0.26",
    "2.12": "0.27",
    "2.13": "0.28",
    "2.14": "0.29",
    "2.15": "0.29",
}
# What depends on PyTorch most: a few minutes for each version.
CORE = [
    "test_model",
    "test_factory",
    "runtime/test_folding",
    "runtime/test_backends",
    "native/test_kernels",
    "native/test_native_training",
    "ops/test_ops",
    "ops/test_fused",
]
CORE += ["training/test_recipe", "training/test_signals", "training/test_training"]
TOOLS = ["setuptools", "pytest", "pytest-xdist", "hypothesis", "psutil", "scikit-image", "scikit-learn"]


@nox.session
@nox.parametrize("torch", list(TORCH), ids=list(TORCH))
def torch(session: nox.Session, torch: str) -> None:
    """The core of the tests with one minor version of torch."""
    session.install(f"torch=={torch}.*", f"torchvision=={TORCH[torch]}.*", "-e", ".[train]", *TOOLS)
    session.run("python", "-c", "import torch; print(torch.__version__)")
    session.run("pytest", "-n", "2", *(f"tests/{name}.py" for name in CORE), *session.posargs)


@nox.session(python="3.10")
def lowest(session: nox.Session) -> None:
    """All tests with the lowest versions of everything."""
    session.install("--resolution", "lowest-direct", "-e", ".[dev]")
    session.run("pytest", "-n", "2", *session.posargs)


@nox.session(python=["3.10", "3.12", "3.13", "3.14"])
def newest(session: nox.Session) -> None:
    """All tests with the newest versions of everything."""
    session.install("--upgrade", "-e", ".[dev]")
    session.run("pytest", "-n", "2", *session.posargs)
