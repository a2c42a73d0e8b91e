"""Where the reference has come to, layer by layer, and what it says of another's.

What is allowed at a point is ``SLACK`` times the error of the reference itself when it rounds as
the other does (``precision.py``). Where the other routes a token otherwise, the reference follows
if the other's own scores say so: whether those are near enough is asked at the scores, and not
again of the experts behind.
"""

from typing import Any

import numpy as np

from gptoss.model.config import ModelConfig
from gptoss.model.reference import NDArray, NumpyOps
from gptoss.model.weights import Block, Read
from gptoss.verify.candidate import Candidate
from gptoss.verify.findings import Finding, See, Tally, relative, worst
from gptoss.verify.layers import (
    Points,
    SteeredOps,
    dense,
    layer_experts,
    load_block,
    regret,
    rerouted,
    run_layer,
    slices,
)
from gptoss.verify.precision import Precision, RoundedOps

SLACK = 5.0  # times the reference's own error when it rounds the same
SAMPLE = 1 << 20  # numbers of the residual stream that the yardstick is measured on
EPS = float(np.finfo(np.float32).eps)
LEAST = 2 * EPS  # an error that any float32 may have: MLX's norm is off by eight spacings
MODES = ("isolated", "propagated")


class Judge:
    """Where the reference has come to, and what it says of each layer."""

    def __init__(
        self,
        candidate: Candidate,
        against: Candidate | None,
        rows: list[NDArray],
        see: See,
        *,
        isolated: bool,
    ) -> None:
        self.candidate, self.against, self.see, self.isolated = candidate, against, see, isolated
        self.config: ModelConfig = candidate.config
        self.read: Read = candidate.read
        precisions = [c.precision for c in (candidate, against) if c is not None]
        self.precision: Precision = max(precisions, key=_coarseness)
        self.slack = SLACK * len(precisions)
        self.starts = np.cumsum([0, *map(len, rows)])
        self.tokens = np.concatenate(rows)
        # What comes in at the next layer: [T, D] of the judge, [S, D] rounding and exact.
        self.true = self.rounded = self.exact = np.empty(0)
        few = np.searchsorted(self.starts, SAMPLE // self.config.hidden_size, side="right") - 1
        self.sampled = self.starts[: max(2, int(few) + 1)]  # the first texts
        self.alive = np.ones(len(self.tokens), bool)  # tokens that are routed alike so far
        # The whole model's choice in each layer, its scores, and how far those may be off.
        self.routes: dict[str, tuple[NDArray, NDArray, NDArray]] = {}

    def embedding(self, own: NDArray | None) -> None:
        """Before the first layer."""
        self.true = dense(self.read, "embedding.weight")[self.tokens].astype(np.float64)
        self.rounded, self.exact = self._sample(), self.true[: self.sampled[-1]]
        if own is not None:
            self._compare(
                "propagated", {"embedding": own}, {"embedding": self.true}, {"embedding": EPS}
            )

    def layer(self, layer: int, own: Points | None) -> None:
        """One layer, in every mode; ``own``: what the whole model made of it."""
        experts = layer_experts(self.read, layer)
        block = load_block(self.read, layer, experts, np.float64)
        true = self._true(layer, block, own)
        alone, along = self._noise(layer, experts, block, true)
        if self.isolated:
            ours = self.candidate.layer(layer, self.true, self.starts)
            same = rerouted(true, layer, ours[f"block.{layer}.mlp.chosen"], block, self.config)
            self._compare("isolated", ours, same, alone)
        if own is not None:
            chosen = f"block.{layer}.mlp.chosen"
            apart = (np.sort(own[chosen]) != np.sort(true[chosen])).any(axis=-1)
            self._compare("propagated", own, true, along, apart)
            self._forget(apart)
            name = f"block.{layer}.mlp.gate"
            scores = own[name]
            near = self.slack * max(along[name], LEAST) * np.abs(scores).max(axis=-1)
            self.routes[chosen] = own[chosen], scores, near
        self.true = true[f"block.{layer}"]

    def _true(self, layer: int, block: Block, own: Points | None) -> Points:
        if self.against is not None:
            return self.against.layer(layer, self.true, self.starts)
        ops = NumpyOps()
        if own is not None:
            scores, chosen = (own[f"block.{layer}.mlp.{x}"] for x in ("gate", "chosen"))
            ops = SteeredOps(chosen, regret(scores, chosen) <= self._ties(scores))
        return run_layer(block, layer, self.true, self.starts, self.config, ops)

    def _ties(self, scores: NDArray) -> NDArray:
        """[T]: scores so near each other are one, in the arithmetic that compares them."""
        return (2.0**-8 if self.precision.results else 8 * EPS) * np.abs(scores).max(axis=-1)

    def _noise(
        self, layer: int, experts: dict[str, Any], block: Block, true: Points
    ) -> list[dict[str, float]]:
        """The rounding reference's relative error at each point, isolated and propagated."""
        S, p = int(self.sampled[-1]), self.precision
        narrow = load_block(self.read, layer, experts, np.float32, p)
        starts = np.concatenate([self.sampled, S + self.sampled[1:]])
        chosen = np.concatenate([true[f"block.{layer}.mlp.chosen"][:S]] * 2).astype(np.intp)
        x = np.concatenate([self._sample(), self.rounded])
        ours = run_layer(narrow, layer, x, starts, self.config, RoundedOps(p, chosen), p)
        self.rounded = ours[f"block.{layer}"][S:]
        if self.against is None:
            exact = {name: np.concatenate([v[:S], v[:S]]) for name, v in true.items()}
        else:  # the judge rounds too
            ops, x = SteeredOps(chosen, np.ones(2 * S, bool)), self.true[:S].astype(np.float64)
            x = np.concatenate([x, self.exact])
            exact = run_layer(block, layer, x, starts, self.config, ops)
            self.exact = exact[f"block.{layer}"][S:]
        halves = slice(0, S), slice(S, 2 * S)
        return [{n: worst(v[half], exact[n][half]) for n, v in ours.items()} for half in halves]

    def _sample(self) -> NDArray:
        """What a rounding reference sees of the right input."""
        return self.precision.result(self.true[: self.sampled[-1]].astype(np.float32))

    def head(self, norm: NDArray | None, logits: NDArray | None) -> None:
        """The last norm, and logits some rows of the vocabulary at a time."""
        scale, eps = dense(self.read, "norm.scale"), self.config.rms_norm_eps
        unembedding = dense(self.read, "unembedding.weight")
        ops = RoundedOps(self.precision)
        wide = NumpyOps().rms_norm(self.true, scale.astype(np.float64), eps)
        narrow = [
            ops.rms_norm(x, scale.astype(np.float32), eps) for x in (self._sample(), self.rounded)
        ]
        noise = [{"norm": worst(x, wide)} for x in narrow]
        sizes = {"noise0": len(narrow[0]), "noise1": len(narrow[0])}
        sizes |= dict.fromkeys(MODES, len(wide))
        tally = {mode: Tally(size) for mode, size in sizes.items()}
        heads = self.candidate.head(self.true) if self.isolated else None
        for rows in slices(self.config):
            true = wide @ unembedding[rows].astype(np.float64).T
            held = self.precision.weight("unembedding.weight", unembedding[rows].astype(np.float32))
            for i, x in enumerate(narrow):
                tally[f"noise{i}"].add(ops.linear(x, held, None), true[: len(x)])
            if heads is not None:
                _, ours = next(heads)
                tally["isolated"].add(ours["logits"], true)
                if not rows.start:
                    first = ours["norm"]
            if logits is not None:
                tally["propagated"].add(logits[:, rows], true)
        for i in (0, 1):
            noise[i]["logits"] = float(tally[f"noise{i}"].errors.max())
        self.allowed = noise[1]["logits"]
        if heads is not None:
            self._compare("isolated", {"norm": first}, {"norm": wide}, noise[0])
            self._find("isolated", "logits", tally["isolated"].errors, noise[0])
        if logits is not None and norm is not None:
            self._compare("propagated", {"norm": norm}, {"norm": wide}, noise[1])
            errors = np.where(self.alive, tally["propagated"].errors, 0.0)
            self._find("propagated", "logits", errors, noise[1])

    def steps(self, own: NDArray, routes: Points, whole: NDArray) -> None:
        """Logits of tokens that came one by one, against the same model's all at once.

        Other shapes round otherwise, and may turn a near tie over: what is behind one is left out.
        """
        self.alive[:] = True
        for name, chosen in routes.items():
            whole_chosen, scores, near = self.routes[name]
            other = (np.sort(chosen) != np.sort(whole_chosen)).any(axis=-1)
            self._forget(other & (regret(scores, chosen) <= 2.0 * near))
        last = len(own) // (len(self.starts) - 1)
        ends = np.concatenate([np.arange(stop - last, stop) for stop in self.starts[1:]])
        errors = np.zeros(len(self.tokens))
        errors[ends] = relative(own, whole[ends])
        errors = np.where(self.alive, errors, 0.0)
        self._find("stepwise", "logits", errors, {"logits": self.allowed})

    def _forget(self, apart: NDArray) -> None:
        """What follows a token that was routed otherwise has another past from here on."""
        for start, stop in zip(self.starts[:-1], self.starts[1:], strict=True):
            if apart[start:stop].any():
                self.alive[start + int(apart[start:stop].argmax()) : stop] = False

    def _compare(
        self,
        mode: str,
        ours: Points,
        true: Points,
        noise: dict[str, float],
        apart: NDArray | None = None,
    ) -> None:
        alive = self.alive if mode == "propagated" else np.ones_like(self.alive)
        for name in true:
            if name not in ours:
                self._find(mode, name, np.full(len(alive), np.inf), noise)
                continue
            if name.endswith(".mlp.chosen"):
                gate = ours[name.replace(".chosen", ".gate")]
                errors = regret(gate, ours[name]) / np.abs(gate).max(axis=-1)
                self._find(mode, name, errors, {name: noise[name.replace("chosen", "gate")]})
                if apart is not None:
                    alive = alive & ~apart
                continue
            errors = np.where(alive, relative(ours[name], true[name]), 0.0)
            self._find(mode, name, errors, noise)

    def _find(self, mode: str, point: str, errors: NDArray, noise: dict[str, float]) -> None:
        at = int(np.argmax(np.where(np.isnan(errors), np.inf, errors)))
        text = int(np.searchsorted(self.starts, at, side="right")) - 1
        self.see(
            Finding(
                mode=mode,
                point=point,
                text=text,
                token=at - int(self.starts[text]),
                error=float(errors[at]),
                allowed=self.slack * max(noise[point], LEAST),
            )
        )


def _coarseness(p: Precision) -> tuple[bool, int, int]:
    return p.results, -(p.dense or 99), -(p.experts or 99)
