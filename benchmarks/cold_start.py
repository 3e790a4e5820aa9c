"""Where the time from the start of a process to its first prediction goes, with weights that ship.

    python benchmarks/cold_start.py [--repeats 7] [--json FILE]

Each repeat is a fresh process that stamps the clock after each step; the files are in the page cache after the first,
which is not counted. Medians are reported. "import convmixer" is what this package adds to torch and timm.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import harness

IMAGE = Path(__file__).parent.parent / "examples" / "images" / "cat.png"
STEPS = {
    "start of Python": "",
    "import torch": "import torch",
    "import timm": "import timm",
    "import convmixer": "import convmixer",
    "create_model": "model = convmixer.create_model('convmixer_256_8', pretrained=True)",
    "first predict": f"convmixer.predict(model, {str(IMAGE)!r})",
    "second predict": f"convmixer.predict(model, {str(IMAGE)!r})",
}


def stamps() -> list[float]:
    """Return the clock before the first step of a process and after each step, in seconds."""
    program = "\n".join(f"{code}\nstamps.append(time.time())" for code in STEPS.values())
    before = time.time()
    run = subprocess.run(
        [sys.executable, "-c", f"import time, json\nstamps = []\n{program}\nprint(json.dumps(stamps))"],
        capture_output=True,
        text=True,
        check=True,
    )
    return [before, *json.loads(run.stdout.splitlines()[-1])]


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    runs = [stamps() for _ in range(arguments.repeats + 1)][1:]
    milliseconds = {name: 1000 * statistics.median(run[i + 1] - run[i] for run in runs) for i, name in enumerate(STEPS)}
    first = 1000 * statistics.median(run[len(STEPS) - 1] - run[0] for run in runs)
    for name, value in milliseconds.items():
        print(f"{name:18} {value:8.1f} ms")
    print(f"start to first prediction {first:.1f} ms")
    harness.write(arguments.json, {"milliseconds": milliseconds, "to_first_prediction": first})


if __name__ == "__main__":
    main()
