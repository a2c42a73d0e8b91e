"""One sequence at a time: bring the cache up to date, draw a token, again.

Simple and correct before fast. What the cache already holds of a prompt is not computed again, so a
conversation costs its new tokens only; nothing else is shared, and no clock, batch or backend has a
say in which token is drawn.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gptoss.backends.protocol import Backend, Batch, Logits, Sampling
from gptoss.errors import CacheMiss, ContextExceeded, GptOssError

STEP_TOKENS = 256  # most new tokens in one forward pass: bounds the memory of a long prompt
GREEDY = Sampling(temperature=0.0)


@dataclass(frozen=True, slots=True)
class Drawn:
    """One token of an answer."""

    token: int
    logprob: float | None  # of the model itself: before temperature and filters; None: not asked


class Generator:
    """One slot of one backend.

    Calls may be mixed freely, also while an earlier answer is still being read: each token is drawn
    from its own whole past, and what the cache lacks of it is computed. Not for several threads.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        vocab_size: int | None = None,
        max_tokens: int | None = None,
        step_tokens: int = STEP_TOKENS,
    ) -> None:
        """``vocab_size``: ids from here on are padding and never drawn (None: there is none).

        ``max_tokens`` is the room for prompt and answer together (None: the model's context).
        """
        config = backend.config
        self.backend, self.step_tokens = backend, step_tokens
        self.vocab_size = config.vocab_size if vocab_size is None else vocab_size
        self.max_tokens = config.context_length if max_tokens is None else max_tokens
        if not 1 <= self.vocab_size <= config.vocab_size:
            raise ValueError(f"vocab_size must be in 1..{config.vocab_size}, not {vocab_size}")
        if not 1 <= self.max_tokens <= config.context_length:
            raise ValueError(f"max_tokens must be in 1..{config.context_length}, not {max_tokens}")
        if step_tokens < 1:
            raise ValueError(f"step_tokens must be at least 1, not {step_tokens}")
        self.cache = backend.new_cache(max_tokens=self.max_tokens)
        self.slot = self.cache.open()
        self.past: list[int] = []  # what the slot holds for certain
        self.reused = 0  # tokens of the last prompt that were not computed again

    def generate(
        self,
        prompt: Sequence[int],
        *,
        rule: Sampling = GREEDY,
        seed: int = 0,
        stop_tokens: frozenset[int] = frozenset(),
        max_tokens: int | None = None,
        logprobs: bool = False,
    ) -> Iterator[Drawn]:
        """Draw tokens until one of ``stop_tokens`` (which is drawn too), ``max_tokens`` or the end
        of the room.

        Raises (here, not at the first token) ValueError for an empty prompt or a bad argument and
        ContextExceeded for a prompt without room; while drawing, GptOssError for NaN logits.
        """
        tokens = self._checked(prompt)
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {max_tokens}")
        uniform(seed, 0)
        room = self.max_tokens - len(tokens) + 1  # the last token drawn is never fed
        limit = room if max_tokens is None else min(max_tokens, room)
        return self._draw(tokens, rule, seed, stop_tokens, limit, logprobs)

    def logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """What the model expects after each token: [T] -> [T, V], padding included."""
        tokens = self._checked(tokens)
        self._rewind(0)
        steps = []
        while len(self.past) < len(tokens):
            chunk = tokens[len(self.past) :][: self.step_tokens]
            steps.append(self.backend.to_numpy(self._step(chunk, range(len(chunk)))))
        return np.concatenate(steps)

    def _draw(
        self,
        tokens: list[int],
        rule: Sampling,
        seed: int,
        stop_tokens: frozenset[int],
        limit: int,
        logprobs: bool,
    ) -> Iterator[Drawn]:
        for count in range(limit):
            logits = self._next(tokens, first=count == 0)  # [1, V]
            [token] = self.backend.sample(logits, [rule], [uniform(seed, len(tokens))])
            logprob = log_softmax(self.backend.to_numpy(logits)[0])[token] if logprobs else None
            tokens.append(token)
            yield Drawn(token, None if logprob is None else float(logprob))
            if token in stop_tokens:
                return

    def _next(self, tokens: list[int], *, first: bool) -> Logits:
        """Logits of the token after all of ``tokens``: [1, V] without padding."""
        held = self._rewind(common(self.past, tokens[:-1]))
        if first:
            self.reused = held
        while (left := len(tokens) - len(self.past)) > self.step_tokens:
            self._step(tokens[-left:][: self.step_tokens], [])
        return self._step(tokens[-left:], [left - 1])[:, : self.vocab_size]

    def _rewind(self, length: int) -> int:
        """Keep the first ``length`` tokens of the past, or none if they are no longer held."""
        try:
            self.cache.truncate(self.slot, length)
        except CacheMiss:
            length = 0
            self.cache.truncate(self.slot, 0)
        del self.past[length:]
        return length

    def _step(self, chunk: Sequence[int], wanted: Sequence[int]) -> Logits:
        """One forward pass. Interrupted, it leaves a past that counts as unknown, hence empty."""
        past, self.past = self.past, []
        self.cache.reserve(self.slot, len(past) + len(chunk))
        batch = Batch.of([chunk], [len(past)], [self.slot], wanted)
        logits = self.backend.forward(batch, self.cache)
        past += chunk
        self.past = past
        if not bool((logits[:, : self.vocab_size] < float("inf")).all()):  # false for NaN too
            self.past = []
            raise GptOssError(
                "the model's output contains NaN or infinity: the checkpoint is damaged, or its "
                "weights are too large for this dtype. `gptoss inspect --check` says where."
            )
        return logits

    def _checked(self, tokens: Sequence[int]) -> list[int]:
        """``tokens`` as a list of our own, if the model can read it."""
        tokens = [int(t) for t in tokens]
        if not tokens:
            raise ValueError("the prompt is empty; the model needs at least one token to continue")
        size = self.backend.config.vocab_size
        if bad := [t for t in tokens if not 0 <= t < size]:
            raise ValueError(f"token {bad[0]} is outside the vocabulary of {size}")
        if len(tokens) > self.max_tokens:
            raise ContextExceeded(self._too_long(len(tokens)))
        return tokens

    def _too_long(self, length: int) -> str:
        context = self.backend.config.context_length
        if self.max_tokens == context:
            return f"the prompt has {length} tokens, more than the model's context of {context}"
        return (
            f"the prompt has {length} tokens, more than the {self.max_tokens} there is room for; "
            f"raise max_tokens (--context); the model's context is {context}"
        )


def uniform(seed: int, position: int) -> float:
    """The one random number in [0, 1) behind the token at ``position``.

    A function of (seed, position) alone: not of the batch, the backend or the clock.
    Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3": Philox4x64 of ten rounds, the
    first number of ``np.random.Generator(np.random.Philox(key=[seed, position])).random()``, whose
    import alone takes longer than a small model's first token.
    """
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must be in 0..2**64 - 1, not {seed}")
    mask, a, b, c, d = (1 << 64) - 1, 1, 0, 0, 0
    for _ in range(10):
        low, high = a * 0xD2E7470EE14C6C93, c * 0xCA5A826395121157
        a, b, c, d = high >> 64 ^ b ^ seed, high & mask, low >> 64 ^ d ^ position, low & mask
        seed, position = seed + 0x9E3779B97F4A7C15 & mask, position + 0xBB67AE8584CAA73B & mask
    return (a >> 11) * 2.0**-53


def log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """[V] -> [V], in float64."""
    x = logits.astype(np.float64)
    x -= x.max()
    x -= np.log(np.exp(x).sum())
    return x


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens ``a`` and ``b`` begin with together."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:  # the usual case, at the speed of a memory comparison
        return n
    return next(i for i in range(n) if a[i] != b[i])
