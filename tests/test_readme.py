"""README says what the registry, pyproject.toml and the records of measurements say."""

import re
from pathlib import Path

import yaml

from convmixer.registry import VARIANTS
from sitegen.figures import draw_charts, ratios

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def section(title):
    return README.partition(f"## {title}")[2].partition("\n## ")[0]


def test_links():
    """Files that README and CONTRIBUTING name are in the repository; links of the site are checked by its build."""
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs" / "runs").glob("*/README.md")):
        text = page.read_text(encoding="utf-8")
        links = re.findall(r"\]\(([^)#]+)[^)]*\)|(?:src|srcset)=\"([^\"]+)\"", text)
        files = [link for pair in links for link in pair if link and "://" not in link]
        assert [file for file in files if not (page.parent / file).exists()] == []


def test_table_of_models():
    lines = [line for line in section("Models").splitlines() if line.startswith("| `convmixer_")]
    assert len(lines) == len(VARIANTS)
    for variant, line in zip(VARIANTS, lines, strict=True):
        name, size, parameters, macs, weights, top1 = (cell.strip() for cell in line.strip("|").split("|"))
        assert (name, size) == (f"`{variant.name}`", str(variant.input_size[1]))
        assert (parameters, macs) == (f"{variant.parameters / 1e6:.2f} M", f"{variant.macs / 1e9:.2f} G")
        if variant.weights:
            first = variant.weights[0]
            assert weights == f"`{first.tag}`, {'in the package' if first.path else 'on the Hub'}"
            assert top1 == f"{first.metrics[0].value:.2f} {first.metrics[0].dataset}"
        else:
            assert (weights, top1) == ("none public", "")


def test_badges():
    python, torch, licence = re.findall(r"badge/(?:\w+)-([\d.]+%2B|\w+)-", README)
    assert f'requires-python = ">={python.removesuffix("%2B")}"' in PYPROJECT
    assert f'"torch>={torch.removesuffix("%2B")}"' in PYPROJECT
    assert f'license = "{licence}"' in PYPROJECT


def test_citation():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert "version" not in citation  # it stands in pyproject.toml, and nowhere else
    assert f'license = "{citation["license"]}"' in PYPROJECT
    assert f'description = "{citation["abstract"]}"' in PYPROJECT


def test_table_of_speed():
    measured = {f"{ours:,.0f} : {peer:,.0f}" for _, ours, peer, _ in ratios()}
    written = set(re.findall(r"[\d,]+ : [\d,]+", section("Speed")))
    assert written <= measured
    assert len(written) == 8


def test_pictures(tmp_path):
    """The committed drawings have the texts that the code draws today; their shapes may differ with matplotlib."""

    def texts(file):
        return re.findall(r"<text[^>]*>([^<]*)</text>", file.read_text(encoding="utf-8"))

    draw_charts(tmp_path)
    committed = sorted((ROOT / "docs" / "images").glob("*.svg"))
    assert [file.name for file in committed] == sorted(file.name for file in tmp_path.iterdir())
    for file in committed:
        assert texts(file) == texts(tmp_path / file.name), "python docs/draw_readme.py draws them again"
        assert file.name in README
        assert file.stat().st_size < 150_000
