"""Check that a tag fits what it releases: python .ci/check_version.py v0.2.0

The version stands in pyproject.toml. CHANGELOG.md must have a section of it with a date, and nothing unreleased above.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def problem(tag: str, pyproject: str, changelog: str) -> str | None:
    """Return what does not fit; None if all fits."""
    found = re.search(r'^version = "(.+)"$', pyproject, re.MULTILINE)
    version = found[1] if found else ""
    if tag != f"v{version}":
        return (
            f"the tag is {tag}, and pyproject.toml has the version {version!r}: tag v{version}, or change the version"
        )
    sections = re.findall(r"^## (.+)$", changelog, re.MULTILINE)
    if not sections or not re.fullmatch(rf"\[?{re.escape(version)}\]? - \d{{4}}-\d\d-\d\d", sections[0]):
        first = sections[0] if sections else "nothing"
        return f"the first section of CHANGELOG.md is {first!r}: call it '{version} - YEAR-MONTH-DAY'"
    return None


if __name__ == "__main__":
    texts = ((ROOT / name).read_text(encoding="utf-8") for name in ("pyproject.toml", "CHANGELOG.md"))
    sys.exit(problem(sys.argv[1], *texts))
