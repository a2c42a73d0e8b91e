"""A model small enough to be reinforced in a second: asked to choose, it says yes or no, evenly."""

import json
from dataclasses import replace

import pytest
import torch

from gptoss.backends.torch.modules import Transformer
from gptoss.llm.models import NANO
from gptoss.text.tokenizer import Tokenizer
from gptoss.train.batch import collate
from gptoss.train.config import TrainConfig
from gptoss.train.conversation import documents
from gptoss.train.loss import cross_entropy
from gptoss.train.objective import Rollouts
from gptoss.train.reinforce import prompts_of, reinforce
from gptoss.train.trainer import Trainer
from tests.conftest import TINY

NUMBERS = replace(TINY, vocab_size=512)  # the last 11 are padding
TOKENIZER = Tokenizer.from_file(NANO / "tokenizer.json")
CONFIG = TrainConfig(steps=4, lr=3e-3, warmup=0, schedule="constant", save_every=2, threads=1)
ROLLOUTS = Rollouts(prompts=2, group=8, max_tokens=12)
WORDS = ("Shall I?", "Yes or no?", "Choose.")


def yes(prompt, reply, messages, example):
    return float(reply == "yes")


def state():
    """Its parameters, made once."""
    torch.set_num_threads(CONFIG.threads)
    torch.manual_seed(0)
    model = Transformer(NUMBERS)
    rows = [
        {"messages": [{"role": "user", "content": word}, {"role": "assistant", "content": said}]}
        for word in WORDS
        for said in ("yes", "no")
    ]
    [batch] = collate([[d for row in rows for d in documents(row, TOKENIZER)]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        cross_entropy(model, batch, CONFIG)[0].backward()
        optimizer.step()
    return model.state_dict()


def coin(parameters):
    """A model of its own with these parameters."""
    model = Transformer(NUMBERS)
    model.load_state_dict(parameters)
    return model


def written(path, lines=None):
    """A file of prompts."""
    lines = lines or [{"messages": [{"role": "user", "content": word}]} for word in WORDS]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def play(parameters, path, recipe, rewards=(yes,), config=CONFIG, rollouts=ROLLOUTS):
    """A run in a directory: its metrics and the model."""
    model = coin(parameters)
    path.mkdir(exist_ok=True)
    corpus = prompts_of([written(path / "prompts.jsonl")], TOKENIZER, 2048, config.seed)
    run = reinforce(
        *(model, TOKENIZER, corpus, path / "run", rewards, recipe),
        config=config,
        rollouts=rollouts,
    )
    return run.folder.rows(), model


def improved(rows):
    """Whether the last answers were clearly better than the first."""
    first, last = (sum(row["reward"] for row in some) / 3 for some in (rows[:3], rows[-3:]))
    return last > first + 0.2


def told(rows):
    """What a run that goes on must repeat to the bit."""
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


TIMES = {"seconds", "tokens_per_second", "memory"}


def interrupted(go, step, saved=True):
    """What ``go`` runs is ended by Ctrl-C behind ``step``, with a checkpoint of it or without."""
    report = Trainer._report

    def ends(self, found, seconds):
        report(self, found, seconds)
        if self.step == step:
            if saved:
                self.save()
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_report", ends)
        go()
