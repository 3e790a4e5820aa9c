"""Write the files of a Hugging Face Space, which serves the page for one model."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from convmixer.demo.classifier import open_classifiers
from convmixer.errors import ArgumentError, ConvMixerError, optional
from convmixer.hub.publish import save_pretrained
from convmixer.registry import get_variant

_README = """---
{header}
---

# {title}

Drop a picture, and see what this [ConvMixer](https://arxiv.org/abs/2201.09792) takes it for, and why.
`app.py` serves the page, and `requirements.txt` names what it needs.
"""
_APP = '''"""A page to try a model, written by `convmixer demo --space`."""

import os
from pathlib import Path

from convmixer.demo import serve

HERE = Path(__file__).parent

if __name__ == "__main__":
    # A Space listens on this port, and forwards visitors to it.
    port = int(os.environ.get("GRADIO_SERVER_PORT", "7860"))
    serve({{{title}: {source}}}, host="0.0.0.0", port=port)
'''


def write_space(folder: str | Path, model: str = "convmixer_256_8.cifar10") -> Path:
    """Write the files of a Space that serves a page to try a model: README.md, app.py and requirements.txt.

    The weights of a run, a file or a folder are copied into the Space, as `save_pretrained` writes them. Weights that
    ship with the package are in it already, and those on the Hub are fetched when the Space starts.

    Args:
        folder: The folder to write; created if it does not exist.
        model: Any name of `create_model`, the folder of a finished run of `convmixer train`, or a .safetensors file.

    Returns:
        The folder.

    Raises:
        ArgumentError: The folder is not empty, or the model does not classify pictures.
        DependencyError: Gradio, whose version the Space pins, is not installed.
        ConvMixerError: The model cannot be opened, or the folder cannot be written. Nothing is left behind.

    Example:
        >>> from convmixer.demo import write_space
        >>> folder = write_space("space", "convmixer_256_8")
        >>> sorted(file.name for file in folder.iterdir())
        ['README.md', 'app.py', 'requirements.txt']
    """
    folder = Path(os.path.expanduser(folder))
    existed = folder.exists()
    if existed and (not folder.is_dir() or any(folder.iterdir())):
        what = "not empty" if folder.is_dir() else "a file"
        raise ArgumentError(f"folder={str(folder)!r} is {what}: give a folder that is empty or does not exist")
    optional("gradio", "a Space", "demo")
    open_classifiers([model], device="cpu", backends=())  # raises here what would fail in the Space
    written: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Inside the folder, which may be on another file system: files are moved, not copied.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as temporary:
            staging = Path(temporary)
            _write(staging, model)
            for path in list(staging.iterdir()):
                written.append(path.replace(folder / path.name))
    except BaseException as error:
        for path in written:  # and nothing else: other programs may have put files there
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if not existed:
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError) and not isinstance(error, ConvMixerError):
            raise ConvMixerError(f"cannot write {str(folder)!r}: {error.strerror or error}. Choose another") from error
        raise
    return folder


def _write(folder: Path, model: str) -> None:
    """Write all files of the Space for a model that can be opened."""
    title, source, model_fields = _describe(folder, model)
    header = {
        "title": title,
        "emoji": "🖼️",
        "colorFrom": "green",
        "colorTo": "blue",
        "sdk": "gradio",
        "sdk_version": metadata.version("gradio"),
        "app_file": "app.py",
        "python_version": "{}.{}".format(*sys.version_info),
        **model_fields,
    }
    yaml = "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in header.items())
    files = {
        "README.md": _README.format(header=yaml, title=title),
        "app.py": _APP.format(title=repr(title), source=source),
        "requirements.txt": f"convmixer[demo]>={metadata.version('convmixer')}\n",
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


def _describe(folder: Path, model: str) -> tuple[str, str, dict[str, object]]:
    """Return the title of a model, the expression in app.py that names it, and its fields of README.md's header.

    The weights of a file or a folder are copied into `folder`.
    """
    fields: dict[str, object]
    path = Path(os.path.expanduser(model.removeprefix("local-dir:"))).resolve()
    if model.startswith("hf-hub:"):
        repository = model.removeprefix("hf-hub:").partition("@")[0]
        return repository.partition("/")[2], repr(model), {"models": [repository]}
    if model.startswith("local-dir:") or path.exists():
        saved = save_pretrained(model, folder / "model")
        licence = json.loads((saved / "config.json").read_text(encoding="utf-8"))["pretrained_cfg"].get("license")
        fields = {"license": licence} if licence else {}
        return path.stem if path.is_file() else path.name, "f\"local-dir:{HERE / 'model'}\"", fields
    variant, weights = get_variant(model)
    assert weights is not None  # it has been opened
    name = f"{variant.name}.{weights.tag}"
    fields = {"license": weights.licence.lower()}
    return name, repr(name), fields | ({"models": [weights.hub_id]} if weights.hub_id else {})
