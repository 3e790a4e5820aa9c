"""README's table says what the registry says."""

from pathlib import Path

from convmixer.registry import VARIANTS

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
MODELS = README.partition("## Models")[2].partition("\n## ")[0]


def test_table_of_models():
    lines = [line for line in MODELS.splitlines() if line.startswith("| `convmixer_")]
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
