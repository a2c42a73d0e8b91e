"""Pack a training run into the published Hugging Face layout: experts MXFP4, the rest bfloat16.

python -m runs.nano.pack checkpoints/nano-run src/gptoss/assets/nano
"""

import sys
from pathlib import Path

from gptoss.backends.torch.modules import Transformer
from gptoss.checkpoint.save import save
from gptoss.model.config import nano
from gptoss.train.export import reader
from gptoss.train.folder import newest, read_state, restore


def pack(run: Path, target: Path) -> None:
    """``run`` is a run's directory; ``target`` must not exist yet."""
    latest, model = newest(run), Transformer(nano())
    if latest is None:
        sys.exit(f"{run}: there is no checkpoint of a run here")
    restore(model, read_state(latest)["model"])
    save(nano(), reader(model), target, "huggingface", tokenizer_path=run / "tokenizer.json")


if __name__ == "__main__":
    pack(Path(sys.argv[1]), Path(sys.argv[2]))
