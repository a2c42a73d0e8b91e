"""Rebuild tests/golden/*.npz: traces of ``transformers``' GptOssForCausalLM on small models.

    PYTHONPATH=src:. python runs/make_golden.py

Needs the test extra. Each file is whole: config, weights, tokens, every trace point, and where they
come from. The tests that read them need neither torch nor transformers.
"""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import transformers

from gptoss.model.mxfp4 import Packed
from tests.model.cases import GOLDEN, STORED
from tests.model.oracle import transformers_trace


def main(folder: Path) -> None:
    """One file for each stored case."""
    torch.set_num_threads(1)
    folder.mkdir(exist_ok=True)
    for name, case in STORED.items():
        weights = case.weights
        arrays = {
            f"trace/{k}": x
            for k, x in transformers_trace(case.config, weights, case.tokens).items()
        }
        for key, x in weights.items():
            if isinstance(x, Packed):
                arrays |= {f"weights/{key}.blocks": x.blocks, f"weights/{key}.scales": x.scales}
            else:
                assert np.array_equal(x, x.astype(np.float16)), f"{key} is no float16"
                arrays[f"weights/{key}"] = x.astype(np.float16)
        provenance = {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "model": "GptOssForCausalLM, float32, eager attention, eager experts, each row alone",
            "seed": case.seed,
            "config": asdict(case.config),
            "tokens": case.tokens,
        }
        path = folder / f"{name}.npz"
        np.savez_compressed(path, provenance=json.dumps(provenance), **arrays)
        print(f"{path}: {path.stat().st_size:,} bytes, {len(arrays)} arrays")


if __name__ == "__main__":
    main(GOLDEN)
