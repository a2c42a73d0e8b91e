"""Pack a training run into the published Hugging Face layout: experts MXFP4, the rest bfloat16.

python -m runs.nano.pack checkpoints/nano-run src/gptoss/assets/nano
"""

import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import torch

from gptoss.checkpoint.save import save
from gptoss.model.config import nano
from gptoss.model.weights import Stored


def pack(run: Path, target: Path) -> None:
    """``run`` holds ``state.pt`` and ``tokenizer.json``; ``target`` must not exist yet."""
    tensors = torch.load(run / "state.pt")["model"]

    def read(name: str) -> Stored:
        whole = tensors[name].numpy()
        expert = name.endswith(("mlp1_weight", "mlp2_weight"))
        return whole if expert else np.asarray(whole, dtype=ml_dtypes.bfloat16)

    save(nano(), read, target, "huggingface", tokenizer_path=run / "tokenizer.json")


if __name__ == "__main__":
    pack(Path(sys.argv[1]), Path(sys.argv[2]))
