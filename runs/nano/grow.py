"""A deeper model that computes the same: layers behind the last one that at first add nothing.

    python -m runs.nano.grow checkpoints/nano-taught checkpoints/nano-grown --layers 6

The new layers are random but for the matrices that write into the residual, which are zero.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from gptoss.backends.torch.modules import Transformer
from gptoss.checkpoint.open import open_checkpoint
from gptoss.checkpoint.save import save
from gptoss.train.export import reader


@torch.no_grad()
def grow(source: Path, target: Path, layers: int, seed: int = 0) -> None:
    """Write the checkpoint at ``source`` with ``layers`` layers, in bfloat16."""
    torch.manual_seed(seed)
    opened = open_checkpoint(source)
    taught = Transformer.from_checkpoint(source, dtype="float32", packed=False)
    config = replace(opened.config, num_hidden_layers=layers)
    model = Transformer(config)
    model.load_state_dict(taught.state_dict(), strict=False)
    new = tuple(f"block.{i}." for i in range(opened.config.num_hidden_layers, layers))
    for name, tensor in model.state_dict().items():
        if name.startswith(new) and (".attn.out." in name or ".mlp2_" in name):
            tensor.zero_()
    words = opened.tokenizer_path
    save(config, reader(model), target, "huggingface-bf16", tokenizer_path=words)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--layers", type=int, default=6)
    args = parser.parse_args()
    grow(args.source, args.target, args.layers)
