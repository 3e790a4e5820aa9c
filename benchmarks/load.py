"""Time to create a model and load its weights from disk: this package, timm, and construction without weights.

    python benchmarks/load.py [--repeats 15] [--json FILE]

Random weights of each variant are written to a temporary file first; what is timed is the same for them. The ways take
turns in one process, and medians are compared, because machines are noisy. The file is in the page cache.
"""

import statistics
import tempfile
from pathlib import Path

import harness
import timm
from safetensors.torch import save_file

import convmixer

VARIANTS = ("convmixer_256_8", "convmixer_768_32", "convmixer_1536_20")


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    results = {}
    for name in VARIANTS:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.safetensors"
            state = convmixer.create_model(name, device="cpu", channels_last=False).state_dict()
            save_file({key: tensor.contiguous() for key, tensor in state.items()}, file)
            overlay = {"file": str(file)}
            ways = {
                "convmixer": lambda name=name, file=file: convmixer.create_model(name, checkpoint=file, device="cpu"),
                "timm": lambda name=name, overlay=overlay: timm.create_model(
                    name, pretrained=True, pretrained_cfg_overlay=overlay
                ),
                "without weights": lambda name=name: convmixer.create_model(name, device="meta"),
            }
            seconds = harness.take_turns(ways, arguments.repeats, warm_up=2)
        medians = {way: statistics.median(times) for way, times in seconds.items()}
        ratio = harness.ratio(seconds["timm"], seconds["convmixer"])
        results[name] = {"median_seconds": medians, "timm_to_convmixer": ratio}
        shown = "  ".join(f"{way} {1000 * median:.1f} ms" for way, median in medians.items())
        print(f"{name:20} {shown}  timm / convmixer {ratio:.2f}")
    harness.write(arguments.json, {"results": results})


if __name__ == "__main__":
    main()
