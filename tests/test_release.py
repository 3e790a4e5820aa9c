"""What a release checks of itself."""

import importlib.util
import re
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
CI = ROOT / ".ci"
pytestmark = pytest.mark.skipif(not CI.is_dir(), reason="the sdist has no .ci, which is for the repository")
WORKFLOW = ROOT / ".github" / "workflows" / "release.yml"


def script(name):
    found = importlib.util.spec_from_file_location(name, CI / f"{name}.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("tag", "changelog", "text"),
    [
        ("v1.2.0", "# Changelog\n\n## 1.2.0 - 2026-12-01\n\n## 1.1.0 - 2026-01-01\n", None),
        ("v1.2.1", "## 1.2.0 - 2026-12-01\n", "the tag is v1.2.1, and pyproject.toml has the version '1.2.0'"),
        ("1.2.0", "## 1.2.0 - 2026-12-01\n", "tag v1.2.0, or change the version"),
        ("v1.2.0", "## Unreleased\n\n## 1.2.0 - 2026-12-01\n", "CHANGELOG.md is 'Unreleased': call it '1.2.0 - YEAR"),
        ("v1.2.0", "## 1.2.0\n", "call it '1.2.0 - YEAR-MONTH-DAY'"),
        ("v1.2.0", "", "is 'nothing'"),
    ],
)
def test_the_tag_and_the_changelog(tag, changelog, text):
    found = script("check_version").problem(tag, '[project]\nversion = "1.2.0"\n', changelog)
    assert (found is None) if text is None else text in found


@pytest.fixture
def dist(tmp_path):
    """A wheel and an sdist that have every file of the package."""
    files = [p for p in (ROOT / "convmixer").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    with zipfile.ZipFile(tmp_path / "convmixer-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("convmixer-1.dist-info/METADATA", "")
        for file in files:
            wheel.writestr(file.relative_to(ROOT).as_posix(), "")
    with tarfile.open(tmp_path / "convmixer-1.tar.gz", "w:gz") as sdist:
        others = [ROOT / name for name in ("pyproject.toml", "README.md", "LICENSE", "docs/index.md")]
        for file in [*files, *others]:
            sdist.add(file, f"convmixer-1/{file.relative_to(ROOT).as_posix()}")
    return tmp_path


def test_contents(dist, capsys):
    """Native kernels are compiled where the wheel is: their sources must be in it."""
    check = script("check_dist")
    wheel, sdist = check._only(dist, "*.whl"), check._only(dist, "*.tar.gz")
    check._check_contents(wheel, sdist)
    assert "convmixer-1.tar.gz: " in capsys.readouterr().out
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("csrc/cpu.cpp")]
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in [*names, "tests/conftest.py"]:
            archive.writestr(name, "")
    with pytest.raises(SystemExit, match=r"lacks \['convmixer/native/csrc/cpu.cpp'\] and has \['tests/conftest.py'\]"):
        check._check_contents(wheel, sdist)
    (dist / "convmixer-2.tar.gz").touch()
    with pytest.raises(SystemExit, match=r"has 2 files \*.tar.gz, where one is expected: empty it, and build again"):
        check._only(dist, "*.tar.gz")


def test_portable_tests_exist():
    missing = [name for name in script("check_dist").PORTABLE if not (ROOT / "tests" / f"{name}.py").is_file()]
    assert missing == []


def test_the_workflow():
    """Publishing waits for the tests of all systems, has no stored token, and happens only for a tag."""
    jobs = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))["jobs"]
    assert set(jobs["test"]["strategy"]["matrix"]["os"]) == {"ubuntu-latest", "macos-latest", "windows-latest"}
    assert {"test", "sdist-tests", "site"} <= set(jobs["publish"]["needs"])
    assert jobs["publish"]["if"] == jobs["pages"]["if"] == "github.event_name == 'push'"
    assert (jobs["publish"]["environment"], jobs["publish"]["permissions"]) == ("pypi", {"id-token": "write"})
    assert "secrets." not in WORKFLOW.read_text(encoding="utf-8")
    uses = [step["uses"] for job in jobs.values() for step in job["steps"] if "uses" in step]
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+@(release/)?v\d+", action) for action in uses)
    for job in jobs.values():
        for step in job["steps"]:
            for name in re.findall(r"\.ci/\w+\.py", step.get("run", "")):
                assert (ROOT / name).is_file()


def test_the_version_stands_in_one_place():
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)[1]
    texts = [ROOT / "CITATION.cff", ROOT / "docs" / "conf.py", *(ROOT / "convmixer").rglob("*.py")]
    assert [file.name for file in texts if f'"{version}"' in file.read_text(encoding="utf-8")] == []
