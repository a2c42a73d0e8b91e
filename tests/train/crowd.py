"""Runs of several processes, one after another, as ``torchrun`` starts them.

torchrun --nproc-per-node 2 -m tests.train.crowd DIRECTORY CASES, a JSON file: {name: change}
"""

import json
import resource
import sys
from dataclasses import replace
from pathlib import Path

import torch

from gptoss.backends.torch.modules import Transformer
from gptoss.train import trainer
from gptoss.train.batch import collate
from gptoss.train.grpo import GroupRelative
from gptoss.train.lora import adapt
from gptoss.train.loss import cross_entropy
from gptoss.train.objective import Grpo, Ppo
from gptoss.train.ppo import Proximal
from gptoss.train.quantize import quantize
from gptoss.train.ranks import ALONE, join
from gptoss.train.reinforce import prompts_of, reinforce
from gptoss.train.trainer import Trainer
from tests.conftest import TINY
from tests.train import coin
from tests.train.runs import CONFIG, documents

NUMBERS = replace(TINY, num_hidden_layers=2)


def model_of(kind):
    """One that trains everything, or for MXFP4, or adapters over packed experts."""
    torch.manual_seed(CONFIG.seed)
    model = Transformer(NUMBERS, packed=kind == "lora")
    if kind == "lora":
        for block in model.block:
            for name in ("mlp1_weight", "mlp2_weight"):
                stack = getattr(block.mlp.experts, name)
                stack.blocks.random_(0, 256)
                stack.scales.fill_(120)
        adapt(model, 4, 16.0)
    elif kind == "qat":
        quantize(model, "ceil")
    return model


def draw(position, batches, counts=(3, 4, 1, 2)):
    """A step of so many batches, some with fewer documents than there are processes."""
    at = position or 0
    groups = [list(documents(at + i, counts[(at + i) % 4])) for i in range(batches)]
    return collate(groups), at + batches


def run(path, kind="all", batches=2, until=None, spoil=None, room=None, ranks=ALONE, **change):
    """As ``runs.train``; ``until``: the step after which Ctrl-C comes, ``spoil``: whose loss is no
    number, ``room``: bytes of a file on the disk."""
    config = replace(CONFIG, **change)
    model = model_of(kind)

    def drawn(position):
        if until is not None and (position or 0) >= until * batches:
            raise KeyboardInterrupt
        return draw(position, batches)

    def loss(batch):
        value, found = cross_entropy(model, batch, config)
        return value * (torch.nan if spoil and spoil in batch.origin else 1.0), found

    trained = Trainer(model, config, path, ranks=ranks)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room or before[0], before[1]))
    try:
        trained.run(drawn, loss)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def answer(path, recipe, strict=False, **change):
    """As ``coin.play``; the coin and its prompts lie beside the run. ``strict``: by ``patient``."""
    model = coin.coin(torch.load(path.parent / "coin.pt"))
    config = replace(coin.CONFIG, **change)
    corpus = prompts_of([path.parent / "prompts.jsonl"], coin.TOKENIZER, 2048, config.seed)
    objective = GroupRelative(Grpo(kl=0.1), coin.ROLLOUTS.group)
    arguments = (model, coin.TOKENIZER, corpus, path, (patient if strict else coin.yes,))
    recipe = objective if recipe == "grpo" else Proximal(Ppo())
    reinforce(*arguments, recipe, config=config, rollouts=coin.ROLLOUTS)


def patient(prompt, reply, messages, example):
    """One process has enough after as many answers as it judges in a round."""
    patient.judged += 1
    if patient.judged > coin.ROLLOUTS.group and torch.distributed.get_rank() == 1:
        raise KeyError("enough")
    return coin.yes(prompt, reply, messages, example)


patient.judged = 0


def main(path, cases):
    for name, how in cases.items():
        named = {key: value for key, value in how.items() if key in vars(CONFIG)}
        try:
            ranks = join(replace(CONFIG, **named))
            if "recipe" in how:
                answer(path / name, **how)
            else:
                run(path / name, ranks=ranks, **how)
        except (Exception, KeyboardInterrupt) as error:
            if torch.distributed.get_rank() == 0:
                (path / f"{name}.error").write_text(f"{type(error).__name__}: {error}")
        torch.distributed.barrier()


if __name__ == "__main__":
    trainer.curves = lambda rows, path: None  # drawing takes longer than the runs
    main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))
