"""A run small enough to be made many times, also as a process that can be killed.

python -m tests.train.runs DIRECTORY
"""

import json
import sys

import torch

from gptoss.backends.torch.modules import Transformer
from gptoss.train.batch import Document, collate
from gptoss.train.config import TrainConfig
from gptoss.train.loss import cross_entropy
from gptoss.train.trainer import Trainer
from tests.conftest import TINY

CONFIG = TrainConfig(steps=12, lr=1e-2, muon=1e-2, warmup=2, balance=0.01, save_every=3, threads=1)


def documents(position, count=3):
    """Counting upwards from a random number: easy to learn."""
    generator = torch.Generator().manual_seed(position)
    for _ in range(count):
        first = int(torch.randint(30, (), generator=generator))
        row = list(range(first, first + 12 + position % 3))
        yield Document(row[:-1], row[1:], f"row {position}")


def draw(position):
    at = position or 0
    torch.rand(1)  # the generator's state matters
    return collate([list(documents(at)), list(documents(at + 1))]), at + 2


def write_sums(path, most):
    """A file of conversations that add two numbers, each less than ``most``."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{a}+{b}?"},
                {"role": "assistant", "content": f"{a + b}"},
            ]
        }
        for a in range(most)
        for b in range(most)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def trainer(path, config=CONFIG, model=None, **rest):
    torch.manual_seed(config.seed)
    return Trainer(model or Transformer(TINY), config, path, **rest)


def train(path, config=CONFIG, draw=draw, **rest):
    """The run, to its end: the rows of its metrics and the trained model."""
    run = trainer(path, config, **rest)
    run.run(draw, lambda batch: cross_entropy(run.model, batch, config))
    return run.folder.rows(), run.model


def losses(rows):
    return [(row["step"], row["loss"], row["norm"]) for row in rows]


if __name__ == "__main__":
    train(sys.argv[1], TrainConfig(**{**vars(CONFIG), "steps": int(sys.argv[2])}))
