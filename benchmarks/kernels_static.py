"""What the compiler makes of the Triton kernels, without a GPU: registers, spills, shared memory, instructions.

    python benchmarks/kernels_static.py [--json FILE] [--capability 80 90]
    python benchmarks/kernels_static.py --table FILE

Compiles each kernel as it would be launched for a block of convmixer_256_8 (k 5), 768_32 (k 7) and 1536_20 (k 9) with
64 images of 32 x 32 positions (16 x 16 for 256_8), for bfloat16 and float32, and disassembles it with the tools in the
triton package. Bytes and operations are computed from the shapes, times from the peaks of an H200. `issue_us` is how
long the streaming multiprocessors need to issue the instructions, four each per cycle: no run can be faster. All
figures are static; nothing here was measured on a GPU. `--table` prints what a file says of bfloat16 on sm_90.
"""

import contextlib
import functools
import json
import math
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)

import harness
import torch
import triton
from harness import H200_CORES, H200_MEMORY, H200_TENSOR_CORES
from torch._subclasses import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from convmixer.ops.triton import launch as kernels
from convmixer.ops.triton.tables import forget_choices, pointwise_key, row
from convmixer.registry import get_variant

BLOCKS = ("convmixer_256_8", "convmixer_768_32", "convmixer_1536_20")
BATCH = 64
MULTIPROCESSORS, CLOCK = 132, 1.755e9  # of an H200
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@contextlib.contextmanager
def launches(capability: int) -> Iterator[list[dict[str, Any]]]:
    """Record what the functions of `convmixer.ops.triton.launch` would launch on a GPU, and run nothing."""
    recorded: list[dict[str, Any]] = []

    def record(kernel: Any, grid: Any, *arguments: Any, warps: int, stages: int = 1, **constants: Any) -> None:
        recorded.append(
            {"kernel": kernel, "grid": grid, "arguments": arguments, "constants": constants}
            | {"options": kernels.options(warps, stages)}
        )

    forget_choices()
    with (
        FakeTensorMode(),
        mock.patch.object(kernels, "_launch", record),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=divmod(capability, 10)),
        mock.patch.object(torch.cuda, "get_device_name", return_value=f"sm_{capability}"),  # of which nothing is tuned
    ):
        yield recorded
    forget_choices()


def compile_launch(launch: dict[str, Any], capability: int) -> Any:
    """Compile a kernel, specialised as Triton does at a launch."""
    names = launch["kernel"].arg_names
    values = named(launch) | launch["constants"]
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(names):
        value = values[name]
        if isinstance(value, torch.Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif name in launch["constants"] or value is None or value == 1:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch["kernel"], signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch["options"])


def disassemble(compiled: Any) -> dict[str, Any]:
    """Return registers, spills, shared memory, and instructions by kind: in total, and in the main loop."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        run = lambda *command: subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: E731
        usage = run(str(tools / "cuobjdump"), "-res-usage", file.name)
        listing = run(str(tools / "nvdisasm"), "-c", file.name)
    instructions: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in listing.splitlines():
        if label := re.match(r"^(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)(.*);", line):
            jump = re.search(r"\((\.L_x_\d+)\)", found[2]) if found[1] == "BRA" else None
            if jump and labels.get(jump[1], len(instructions)) < len(instructions):
                loops.append((labels[jump[1]], len(instructions) + 1))
            instructions.append(found[1])
    # The longest of the innermost loops is the main one; what it jumps to behind the end is rare.
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    begin, end = max(inner, key=lambda loop: loop[1] - loop[0], default=(0, 0))
    spills = sum(name in ("LDL", "STL") for name in instructions)
    return {
        "registers": int(re.findall(r"REG:(\d+)", usage)[0]),
        "stack_bytes": int(re.findall(r"STACK:(\d+)", usage)[0]),
        "spill_instructions": spills,
        "shared_bytes": compiled.metadata.shared,
        "instructions": _kinds(instructions),
        "loop": _kinds(instructions[begin:end]),
    }


def _kinds(instructions: list[str]) -> dict[str, int]:
    kinds = {
        "fma": ("FFMA",),
        "tensor": ("HMMA", "HGMMA"),
        "global": ("LDG", "STG", "LDGSTS"),
        "shared": ("LDS", "STS", "LDSM", "STSM"),
    }
    count = Counter(instructions)
    return {"total": len(instructions)} | {name: sum(count[k] for k in of) for name, of in kinds.items()}


def cases(dim: int, size: int, side: int, dtype: torch.dtype) -> dict[str, tuple[Any, int, float, float]]:
    """Return for each kernel its call, and per image bytes moved and operations of tensor cores and float32 cores."""
    x = torch.empty(BATCH, dim, side, side, dtype=dtype, device="cuda").to(memory_format=torch.channels_last)
    vector = torch.empty(dim, device="cuda")
    kernel = torch.empty(dim, 1, size, size, dtype=dtype, device="cuda")
    weight = torch.empty(dim, dim, dtype=dtype, device="cuda")
    values = dim * side * side
    tensor, taps, products = values * dtype.itemsize, 2.0 * size * size * values, 2.0 * dim * values
    # Three multiplications of TF32, at half the rate, make one of float32.
    dots = (products if dtype.itemsize == 2 else 6 * products, 0.0)
    convolve = functools.partial(kernels._convolve, x, kernel)
    multiply = functools.partial(kernels._multiply, x, weight, vector, "gelu")
    infer = {"scale": vector, "shift": vector}
    normalize = functools.partial(kernels._normalize, x, "gelu", vector, vector)
    sums = lambda what, **given: kernels._sums(what, x, "gelu", **given)  # noqa: E731
    formed = row("pointwise", pointwise_key(dim, True), x)._replace(apart=False)
    given = row("pointwise", pointwise_key(dim, False), x)
    found: dict[str, tuple[Any, int, float, float]] = {
        "depthwise": (lambda: convolve(vector, "gelu", center=vector), 2, 0.0, taps),
        "depthwise_infer": (lambda: convolve(vector, "gelu", residual=x, **infer), 2, 0.0, taps),
        "depthwise_input_grad": (lambda: convolve(None, "identity", residual=x, transpose=True), 3, 0.0, taps),
        "depthwise_weight_grad": (lambda: kernels._correlate(x, x, size), 2, 0.0, taps),
        "pointwise, z on the way": (lambda: multiply((vector, vector, x), vector, config=formed), 3, *dots),
        "pointwise of z": (lambda: multiply(center=vector, config=given), 2, *dots),
        "pointwise_infer": (lambda: multiply(config=given, **infer), 2, *dots),
        "normalize_act": (normalize, 2, 0.0, 0.0),
        "sum_normalized": (lambda: normalize(None, x, vector, vector, "gelu"), 3, 0.0, 0.0),
        "normalize_act_grad": (lambda: sums(0, grad=x, scale=vector), 3, 0.0, 0.0),
        "stats_grad": (lambda: sums(1, grad=x, center=vector, grad_s=vector, grad_q=vector), 3, 0.0, 0.0),
        "stats": (lambda: sums(2, center=vector), 1, 0.0, 0.0),
    }
    return {name: (call, passes * tensor, *work) for name, (call, passes, *work) in found.items()}


def named(launch: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a launch by name."""
    return dict(zip(launch["kernel"].arg_names, launch["arguments"], strict=False))


def tiles(launch: dict[str, Any]) -> float:
    """Return how many tiles a program computes."""
    return float(named(launch)["tiles"] / launch["grid"][0])


def trips(launch: dict[str, Any]) -> float:
    """Return how often the main loop of a launch runs, for each tile of `depthwise`."""
    constants, kernel = launch["constants"], launch["kernel"].__name__
    if kernel == "depthwise":
        return float(constants["K"] - constants["ROWS"] + 1)
    if kernel in ("depthwise_weight_gradient", "sums_of_tiles"):
        return tiles(launch)
    return float(constants["C"] / constants["INPUTS"]) if kernel == "pointwise" else 1.0


def report(
    capability: int, dtype: torch.dtype, variant: str, names: Collection[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield a record for each kernel of a block, or for those named."""
    shape, _ = get_variant(variant)
    with launches(capability) as recorded:
        everything = cases(shape.dim, shape.kernel_size, harness.feature_side(variant), dtype)
        calls = {name: case for name, case in everything.items() if names is None or name in names}
        for call, *_ in calls.values():
            call()
    main = [launch for launch in recorded if launch["kernel"] is not kernels.kernels.add_up]
    for (name, (_, moved, tensor, cores)), launch in zip(calls.items(), main, strict=True):
        static = disassemble(compile_launch(launch, capability))
        loop = static["loop"]["total"]
        issued = static["instructions"]["total"] - loop + trips(launch) * loop
        if launch["kernel"].__name__ == "depthwise":
            issued *= tiles(launch)
        issued *= launch["options"]["num_warps"] * math.prod(launch["grid"]) / BATCH
        roofs = {
            "memory": moved / H200_MEMORY,
            "tensor cores": tensor / H200_TENSOR_CORES,
            "float32 cores": cores / H200_CORES,
        }
        bound = max(roofs, key=lambda key: roofs[key])
        yield {
            "block": variant,
            "dtype": str(dtype).removeprefix("torch."),
            "capability": capability,
            "kernel": name,
            "config": {k: v for k, v in launch["constants"].items() if k not in ("C", "OUT", "K", "ACT")}
            | {"warps": launch["options"]["num_warps"], "stages": launch["options"]["num_stages"]},
            **static,
            "bytes_per_image": moved,
            "flops_per_image": tensor + cores,
            "h200_roof_us": round(1e6 * roofs[bound], 3),
            "bound": bound,
            "h200_issue_us": round(1e6 * issued / (4 * MULTIPROCESSORS * CLOCK), 3),
        }


def table(file: Path) -> str:
    """Return a Markdown table of what a file says about bfloat16 on sm_90."""
    lines = [
        "| block | kernel | registers | shared KiB | instructions | loop: all, FMA, tensor | roof, us | issue, us |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for record in json.loads(file.read_text())["kernels"]:
        if record["capability"] == 90 and record["dtype"] == "bfloat16":
            loop = record["loop"]
            inside = f"{loop['total']}, {loop['fma']}, {loop['tensor']}" if loop["total"] else "no loop"
            cells = [
                record["block"],
                record["kernel"],
                record["registers"],
                f"{record['shared_bytes'] / 1024:.0f}",
                f"{record['instructions']['total']:,}",
                inside,
                f"{record['h200_roof_us']:.2f} ({record['bound']})",
                f"{record['h200_issue_us']:.2f}",
            ]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--capability", type=int, nargs="*", default=[80, 90])
    parser.add_argument("--block", nargs="*", default=list(BLOCKS), choices=list(BLOCKS))
    parser.add_argument("--dtype", nargs="*", default=["bfloat16", "float32"])
    parser.add_argument("--table", type=Path)
    arguments = parser.parse_args()
    if arguments.table:
        print(table(arguments.table))
        return
    records = []
    for variant in arguments.block:
        for dtype in arguments.dtype:
            for capability in arguments.capability:
                for record in report(capability, getattr(torch, dtype), variant):
                    records.append(record)
                    print(
                        f"{variant:18} {dtype:8} sm_{capability} {record['kernel']:29} "
                        f"{record['registers']:3} registers, "
                        f"{record['spill_instructions']:3} spills, {record['shared_bytes']:6} B shared, "
                        f"{record['instructions']['total']:5} instructions, loop {record['loop']['total']:4} "
                        f"({record['loop']['fma']} FMA, {record['loop']['tensor']} tensor), "
                        f"roof {record['h200_roof_us']:7.3f} us ({record['bound']}), "
                        f"issue {record['h200_issue_us']:7.3f} us",
                        flush=True,
                    )
    if arguments.json:
        content = {
            "command": "python benchmarks/kernels_static.py --json FILE",
            "measured_on_gpu": False,
            "batch": BATCH,
            "versions": {"triton": triton.__version__, "torch": torch.__version__},
        }
        lines = ",\n".join(json.dumps(record) for record in records)  # one to a line
        arguments.json.write_text(json.dumps(content)[:-1] + f', "kernels": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
