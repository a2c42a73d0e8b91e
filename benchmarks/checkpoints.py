"""Seconds and peak memory of writing, opening and converting a checkpoint at full size.

    python benchmarks/checkpoints.py /tmp/bench --preset 20b --layers 24

Each step runs in its own process, so that its peak resident memory is its own; opening is also
measured with the ``safetensors`` library. Prints a table and ends with one JSON line; needs about
30 GB of disk for 20b. The synthesized checkpoint is left in place, the converted one is removed.
"""

import argparse
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

PEAK = """
import re, time, sys
from pathlib import Path
started = time.perf_counter()
{code}
seconds = time.perf_counter() - started
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
print(seconds, peak)
"""
SYNTHESIZE = """
from dataclasses import replace
from gptoss.model.config import PRESETS
from gptoss.checkpoint.synthesize import synthesize
synthesize(replace(PRESETS["{preset}"](), num_hidden_layers={layers}), Path("{source}"))
"""
OPEN = """
from gptoss.checkpoint.open import open_checkpoint
assert open_checkpoint(Path("{source}")).tensors
"""
OPEN_OFFICIAL = """
from safetensors import safe_open
for file in sorted(Path("{source}").glob("*.safetensors")):
    with safe_open(file, "numpy") as opened:
        assert [opened.get_slice(name).get_shape() for name in opened.keys()]
"""
CONVERT = """
from gptoss.checkpoint.save import convert
convert(Path("{source}"), Path("{target}"), "original")
"""


def measure(code: str, **names: object) -> dict[str, float]:
    """Run ``code`` in a fresh interpreter."""
    script = PEAK.format(code=code.format(**names))
    out = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    seconds, peak = out.stdout.split()
    return {"seconds": float(seconds), "peak_bytes": float(peak)}


def main() -> None:
    """Measure every step, once."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", default="20b")
    parser.add_argument("--layers", type=int, default=24)
    args = parser.parse_args()
    source, target = args.folder / args.preset, args.folder / f"{args.preset}-original"
    names = {"preset": args.preset, "layers": args.layers, "source": source, "target": target}
    steps = {
        "synthesize": SYNTHESIZE,
        "open": OPEN,
        "open, safetensors library": OPEN_OFFICIAL,
        "convert huggingface to original": CONVERT,
    }
    results = {name: measure(code, **names) for name, code in steps.items()}
    size = sum(f.stat().st_size for f in source.glob("*.safetensors"))
    shutil.rmtree(target)
    print("| step | seconds | MB/s | peak resident MB |\n|---|---|---|---|")
    for name, row in results.items():
        rate = "" if name.startswith("open") else f"{size / row['seconds'] / 1e6:.0f}"
        print(f"| {name} | {row['seconds']:.2f} | {rate} | {row['peak_bytes'] / 1e6:.0f} |")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    machine = f"{platform.machine()}, {platform.processor() or platform.system()}"
    line = {"benchmark": "checkpoints", "machine": machine, "commit": commit.stdout.strip()}
    print(json.dumps(line | {"bytes": size, "layers": args.layers, "results": results}))


if __name__ == "__main__":
    main()
