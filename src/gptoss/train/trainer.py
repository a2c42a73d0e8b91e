"""The loop that every recipe shares: draw, loss, backward, clip, step, log, save; and going on.

    trainer = Trainer(model, config, "runs/first", asked={"recipe": "sft", "model": "nano"})
    trainer.run(draw, loss)

A recipe is two functions:

* ``draw(position)`` -> (the batches of one step, the position after them). A position is whatever
  the recipe must be told to go on: numbers, lists, dicts, tensors. None is the beginning.
* ``loss(batch)`` -> (its share of the step's loss, its share of the step's metrics). Both are
  summed over the batches of a step; ``tokens`` among the metrics gives the speed.

Whatever is drawn at random comes from torch's generator or from the position. So a run that was
killed at any moment goes on from its last checkpoint with the same numbers, to the bit on a CPU.
"""

import math
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from gptoss.errors import CheckpointError, GptOssError, TrainingError
from gptoss.train.config import TrainConfig, rate
from gptoss.train.folder import Folder
from gptoss.train.learner import Learner
from gptoss.train.offload import learner_of
from gptoss.train.ranks import ALONE, Ranks
from gptoss.train.show import Board, curves
from gptoss.train.stop import Stop, Stopped

B = TypeVar("B")
Row = dict[str, Any]
Draw = Callable[[Any], tuple[list[B], Any]]
PICTURE = 60.0  # seconds between two pictures of the curves
Loss = Callable[[B], tuple[Any, dict[str, Any]]]  # of torch a tensor and numbers


class Trainer(Generic[B]):
    """One run in one directory.

    Args:
        model: what is trained: a module's parameters that want a gradient, or another ``Learner``.
        config: how.
        path: the run's directory; if a run is there already, this one goes on from it.
        asked: what else the run depends on; going on with something else is refused.
        share: the learning rate of a step as a share of its peak, in place of the config's.
        watch: is told each row of metrics.
        ranks: the processes that train together; each calls this with the same arguments.

    Raises:
        ValueError: ``model`` cannot be divided among ``ranks``.
        TrainingError: another run is at work there, or one that was begun with something else.
    """

    def __init__(
        self,
        model: nn.Module | Learner,
        config: TrainConfig,
        path: Path | str,
        *,
        asked: dict[str, Any] | None = None,
        share: Callable[[int], float] | None = None,
        watch: Callable[[Row], None] | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        if config.device == "cpu":
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        self.model, self.config, self.watch, self.ranks = model, config, watch, ranks
        self.share = share or (lambda step: rate(step, config))
        self.stop = Stop()
        self.step, self.position, self.tokens = 0, None, 0.0
        self._drawn = time.monotonic()
        self.folder = Folder(path, asdict(config) | (asked or {}), ranks)
        try:
            if isinstance(model, nn.Module):
                model = learner_of(model, config, path, ranks=ranks)
            self.learner: Learner = model
            self.board = Board(self.folder.path, config.tensorboard and ranks.first)
            torch.manual_seed(config.seed)
            if (state := self.folder.load(mapped=config.offload is not None)) is not None:
                self._restore(state)
        except BaseException:
            self.folder.close()
            raise

    def run(self, draw: Draw[B], loss: Loss[B]) -> None:
        """Train to the last step. What goes wrong between two steps costs nothing.

        Raises:
            TrainingError: the loss is no number; the last checkpoint is kept.
            CheckpointError: a checkpoint could not be written; the last one is kept.
            Stopped: SIGINT or SIGTERM came; the last finished step is kept.
        """
        with self.stop.heard():
            try:
                while self.step < self.config.steps:
                    if (number := self.ranks.any(self.stop.number)) is not None:
                        self.save()  # nothing where a step was left half done: that has been saved
                        raise Stopped(number, self.folder.path, self.step)
                    self._advance(draw, loss)
            except RuntimeError as error:
                if not self.ranks.lost(error):
                    raise
                raise TrainingError(
                    f"{self.folder.path}: a process of this run has ended; {self._kept()}. "
                    "The same command goes on."
                ) from None
            finally:
                self.close()

    def _advance(self, draw: Draw[B], loss: Loss[B]) -> None:
        """A step, and a checkpoint where one is due."""
        began, random = time.perf_counter(), _random()
        together, drawn = True, list[tuple[list[B], Any]]()
        try:
            with self.stop.interruptible() if self.ranks.alone else nullcontext():
                self.ranks.agreed(lambda: drawn.append(draw(self.position)))
                together, [(batches, after)] = self.ranks.alone, drawn
                found = self._losses(batches, loss)
        except Diverged:
            raise
        except (GptOssError, ValueError, KeyboardInterrupt):
            if not together:  # to save takes all processes, and they may be elsewhere
                raise
            self.save(random)
            if self.stop.number is not None:
                return  # as if this step had not begun
            raise
        self.learner.update(found["rate"])
        self.position, self.step = after, self.step + 1
        self._report(found, time.perf_counter() - began)
        if self.step % self.config.save_every == 0 or self.step == self.config.steps:
            self.save()

    def close(self) -> None:
        """Let others train here."""
        self._draw()
        self.board.close()
        self.folder.close()

    def _losses(self, batches: list[B], loss: Loss[B]) -> dict[str, float]:
        """Gradients of all batches, and the sums of what they report; ``norm`` and ``rate`` too."""
        self.learner.begin()
        found: dict[str, float] = {"loss": 0.0}
        wrong: list[B] = []
        for batch in self.ranks.share(batches):
            value, metrics = self.learner.learn(batch, loss)
            if not math.isfinite(value):
                wrong.append(batch)
            for name, more in {"loss": value, **metrics}.items():
                found[name] = found.get(name, 0.0) + more
        found = self.ranks.total(found)
        if not math.isfinite(found["loss"]):
            raise Diverged(self._no_number("loss", found["loss"], wrong))
        norm = self.learner.clip(self.config.clip)
        if not math.isfinite(norm):
            raise Diverged(self._no_number("gradient", norm, batches))
        return found | {"norm": norm, "rate": self.share(self.step)}

    def _no_number(self, what: str, value: float, batches: list[B]) -> str:
        origins = [str(getattr(batch, "origin", "no name")) for batch in batches]
        origin = ", ".join(dict.fromkeys(o for each in self.ranks.gather(origins) for o in each))
        origin = origin if len(origin) <= 400 else f"{origin[:400]}..."
        return (
            f"{self.folder.path}: the {what} of step {self.step + 1} is {value}, in the batch of "
            f"{origin}; {self._kept()}. Look at these examples, or train with a lower rate."
        )

    def _kept(self) -> str:
        kept = self.folder.latest()
        return f"the checkpoint of step {int(kept.name)} is kept" if kept else "nothing was saved"

    def _report(self, found: dict[str, float], seconds: float) -> None:
        self.tokens += found.get("tokens", 0.0)
        if not self.ranks.first:
            return
        row: Row = {"step": self.step, **found, "seen": self.tokens, "seconds": seconds}
        row |= {"tokens_per_second": found.get("tokens", 0.0) / seconds, "memory": memory(self)}
        self.folder.append(row)
        self.board.add(row)
        if self.watch is not None:
            self.watch(row)

    def save(self, random: dict[str, Any] | None = None) -> None:
        """A checkpoint of now; ``random``: with the generators as they were then."""
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "position": self.position,
            "model": self.learner.trained(),
            "optimizers": self.learner.optimized(),
            "random": random or _random(),
        }
        try:
            self.folder.save(self.step, state)
        except CheckpointError as error:
            kept = self.folder.latest()
            last = f"from step {int(kept.name)}" if kept else "from its beginning"
            said = str(error).rstrip(".")
            raise CheckpointError(f"{said}. The run goes on {last} once there is room.") from None
        self.folder.prune(self.config.keep, self.config.milestone)
        if time.monotonic() - self._drawn > PICTURE:
            self._draw()

    def _draw(self) -> None:
        if self.ranks.first:
            curves(self.folder.rows(), self.folder.path / "curves.png")
        self._drawn = time.monotonic()

    def _restore(self, state: dict[str, Any]) -> None:
        if missing := set(self.learner.trained()) ^ set(state["model"]):
            raise TrainingError(
                f"{self.folder.path}: its checkpoint and this model differ in {min(missing)}"
            )
        self.learner.restore(state["model"], state["optimizers"])
        self.step, self.position, self.tokens = state["step"], state["position"], state["tokens"]
        torch.set_rng_state(state["random"]["cpu"])
        if state["random"]["cuda"]:
            torch.cuda.set_rng_state_all(state["random"]["cuda"])


class Diverged(TrainingError):
    """A loss or a gradient that is no number."""


def memory(trainer: Trainer[Any]) -> int:
    """Most bytes in use so far: of the process, or on its GPU; 0 where the system does not say."""
    if trainer.config.device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _random() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}
