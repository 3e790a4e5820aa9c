"""Check what `python -m build` made, as users get it: python .ci/check_dist.py dist

The wheel is installed into an empty environment, in a folder whose name has a space. There it classifies the cat, and
compiles its native kernels where the machine has what they need. The sdist is unpacked and installed into an
environment of its own, which runs the tests that lie in it. Standard library only, for Linux, macOS and Windows.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MOST_BYTES = 8e6  # of the wheel
# Tests that need neither a C++ compiler nor what only Linux has.
PORTABLE = [
    "test_evaluation",
    "test_hardware",
    "test_inference",
    "test_model",
    "test_portability",
    "test_public_api",
    "test_readme",
    "test_registry",
    "test_timm",
    "test_transforms",
    "test_weights",
    "cli/test_cli_info",
    "cli/test_cli_list",
    "cli/test_cli_predict",
    "data/test_images",
    "data/test_tables",
    "hub/test_convert",
    "ops/test_ops",
    "runtime/test_folding",
    "training/test_augment",
    "training/test_optimizers",
    "training/test_recipe",
]
TEST_TOOLS = ["pytest", "hypothesis", "psutil", "pyyaml", "scikit-image", "scikit-learn", "sybil"]

KERNELS = """
import sys, torch, convmixer
from convmixer.errors import DependencyError
from convmixer.native import training
model = convmixer.create_model("convmixer_128_8_ks7_p2", pretrained=True, device="cpu").eval()
x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
try:
    fast = convmixer.optimize(model, backend="native")
except DependencyError as error:
    print("native kernels are not compiled here:", error)
    sys.exit(sys.argv[1] == "must")
with torch.inference_mode():
    error = (fast(x) - model(x)).abs().max().item()
print(f"native kernels compiled, logits differ by at most {error:.1e}; of training: {training.lacking() or 'compiled'}")
assert error < 1e-3 and not training.lacking()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dist", type=Path, help="folder with one wheel and one sdist of the same version")
    parser.add_argument("--base", type=Path, help="site-packages that has torch and the tools of the tests already")
    parser.add_argument("--kernels", choices=("must", "may"), default="may", help="whether they must compile here")
    parser.add_argument("--tests", choices=("none", "portable", "all"), default="none", help="of the sdist")
    parser.epilog = "What stands behind -- goes to pytest: tests to run, and options."
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options, more = parser.parse_args(sys.argv[1:end]), sys.argv[end + 1 :]
    wheel, sdist = _only(options.dist, "*.whl"), _only(options.dist, "*.tar.gz")
    _check_contents(wheel, sdist)
    with tempfile.TemporaryDirectory(prefix="convmixer dist ", ignore_cleanup_errors=True) as scratch:
        _check_wheel(wheel, Path(scratch), options.base, options.kernels)
        if options.tests != "none" or more:
            portable = options.tests == "portable"
            chosen = [f"tests/{name}.py" for name in PORTABLE] if portable else []
            told = {"CXX": "no-such-compiler"} if portable else {}  # they are to pass without one
            extra = "dev" if options.tests == "all" else "train"
            _check_sdist(sdist, extra, Path(scratch), options.base, [*chosen, *more], told)
    print(f"{wheel.name} and {sdist.name} are fit to be published")


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        sys.exit(f"{folder} has {len(found)} files {pattern}, where one is expected: empty it, and build again")
    return found[0].resolve()


def _check_contents(wheel: Path, sdist: Path) -> None:
    """Nothing of the package is missing in the wheel, and nothing else is in it."""
    source = ROOT / "convmixer"
    wanted = {
        path.relative_to(ROOT).as_posix()
        for path in source.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    if found != wanted:
        sys.exit(f"{wheel.name} lacks {sorted(wanted - found)} and has {sorted(found - wanted)} besides")
    if wheel.stat().st_size > MOST_BYTES:
        sys.exit(f"{wheel.name} has {wheel.stat().st_size:,} bytes, more than {MOST_BYTES:,.0f}")
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    lacking = [
        name for name in [*wanted, "pyproject.toml", "README.md", "LICENSE", "docs/index.md"] if name not in names
    ]
    if lacking:
        sys.exit(f"{sdist.name} lacks {sorted(lacking)}")
    print(f"{wheel.name}: {wheel.stat().st_size:,} bytes, {len(found)} files; {sdist.name}: {len(names)} files")


class _Environment:
    """A virtual environment, which may see the packages of a base through a .pth file."""

    def __init__(self, folder: Path, base: Path | None) -> None:
        self.base = base
        venv.create(folder, with_pip=True)
        windows = sys.platform == "win32"
        self.programs = folder / ("Scripts" if windows else "bin")
        self.python = self.programs / ("python.exe" if windows else "python")
        self.packages = Path(self.run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))", quiet=True))
        if base:
            (self.packages / "base.pth").write_text(f"{base.resolve()}\n", encoding="utf-8")

    def install(self, *wanted: str) -> None:
        """Install a distribution; with a base without what it needs, which is there."""
        self.run("-m", "pip", "install", "--quiet", *(["--no-deps"] if self.base else []), *wanted)

    def run(self, *arguments: str, cwd: Path | None = None, quiet: bool = False, **more: str) -> str:
        """What a Python program prints; the end of the check if it fails."""
        hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
        env = {key: value for key, value in os.environ.items() if key not in hidden} | more
        command = [str(self.python), *arguments]
        done = subprocess.run(command, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE if quiet else None)
        if done.returncode:
            sys.exit(f"{' '.join(command)} ended with status {done.returncode}\n{done.stdout or ''}")
        return (done.stdout or "").strip()


def _check_wheel(wheel: Path, scratch: Path, base: Path | None, kernels: str) -> None:
    environment = _Environment(scratch / "wheel env", base)
    environment.install(str(wheel))
    empty = scratch / "an empty folder"
    empty.mkdir()
    told = {"XDG_CACHE_HOME": str(scratch / "cache of kernels"), "HF_HUB_OFFLINE": "1"}
    where = environment.run("-c", "import convmixer; print(convmixer.__file__)", cwd=empty, quiet=True)
    if environment.packages.resolve() not in Path(where).resolve().parents:
        sys.exit(f"convmixer was imported from {where}, not from the wheel")
    cat = str(ROOT / "examples" / "images" / "cat.png")
    said = environment.run("-m", "convmixer", "predict", cat, cwd=empty, quiet=True, **told)
    print(said)
    if "cat " not in said.replace("cat.png", ""):
        sys.exit("the wheel does not recognise the cat")
    program = environment.programs / ("convmixer.exe" if sys.platform == "win32" else "convmixer")
    version = subprocess.run([program, "--version"], check=True, capture_output=True, text=True).stdout.split()[-1]
    if f"-{version}-" not in wheel.name:
        sys.exit(f"convmixer --version says {version}, the file is {wheel.name}")
    environment.run("-c", KERNELS, kernels, cwd=empty, **told)


def _check_sdist(
    sdist: Path, extra: str, scratch: Path, base: Path | None, chosen: list[str], told: dict[str, str]
) -> None:
    environment = _Environment(scratch / "sdist env", base)
    environment.install(f"{sdist}[{extra}]", *([] if base else TEST_TOOLS))
    with tarfile.open(sdist) as archive:
        archive.extractall(scratch, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    tree = scratch / sdist.name.removesuffix(".tar.gz")
    environment.run("-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen, cwd=tree, **told)


if __name__ == "__main__":
    main()
