"""A checkpoint as tokens in, tokens out: the same on every backend."""

import re
import secrets
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Literal, overload

import numpy as np
import numpy.typing as npt

from gptoss.backends import load_backend
from gptoss.backends.protocol import Sampling
from gptoss.checkpoint.open import Checkpoint, open_checkpoint
from gptoss.engine import Engine, Request
from gptoss.errors import TokenizerError
from gptoss.llm.models import resolve
from gptoss.llm.plan import Plan, make_plan
from gptoss.model.weights import Stored, specs
from gptoss.text.tokenizer import Tokenizer

O200K_SIZE = 201_088
NEEDED = ("start", "end", "message", "channel", "constrain", "return", "call", "endoftext")
PADDING = 2048  # ids without a token that are no surprise, even in a small vocabulary
RESERVED = re.compile(r"<\|reserved_\d+\|>")
Progress = Callable[[int, int], None]  # tensors loaded, tensors in all
Announce = Callable[[Plan], None]


class TokenGenerator:
    """``TokenGenerator(dir).generate(tokens)``.

    The end of the vocabulary, ids of no token or of reserved ones only, is never drawn.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        backend: str = "auto",
        *,
        dtype: str | None = None,
        device: str | None = None,
        precision: str | None = None,
        threads: int | None = None,
        kv: str | None = None,
        memory: int | None = None,
        max_tokens: int | None = None,
        conversations: int = 1,
        force: bool = False,
        announce: Announce | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Load a model.

        Args:
            checkpoint: a path, "nano", or a Hugging Face id.
            precision: of the native backend: "fast" (8-bit; the default) or "exact" (the weights
                as published; of a narrow model, always).
            threads: of the native backend; by default one for each core.
            kv: of the native backend: keys and values in "bfloat16" (the default of fast),
                "float32" (of exact) or "int8", for which a context takes half of bfloat16's memory.
            memory: of the native backend: bytes that the model may take. What does not fit of
                packed experts stays on disk and is read when used. By default, what is free.
            max_tokens: room for prompt and answer together; by default 16,384, or the model's
                context if that is less.
            conversations: whose room the cache has together; more may run if they are shorter.
            force: load although memory is too little.
            announce: is given the plan before anything is loaded.
            progress: is called as tensors are loaded.

        Raises:
            ValueError: an unknown backend, dtype, device or precision, one that does not apply, or
                room beyond the context.
            GptOssError: the files, the vocabulary, the hardware or the memory will not do.
        """
        opened = open_checkpoint(resolve(checkpoint))
        self.config = opened.config
        self.tokenizer = load_tokenizer(opened)
        self.plan = make_plan(
            opened,
            backend=backend,
            dtype=dtype,
            device=device,
            precision=precision,
            threads=threads,
            kv=kv,
            memory=memory,
            max_tokens=max_tokens,
            conversations=conversations,
        )
        if announce is not None:
            announce(self.plan)
        if not force:
            self.plan.check()
        self.engine = Engine(
            load_backend(
                self.plan.backend,
                opened.config,
                _counting(opened, progress),
                dtype=self.plan.dtype,
                device=self.plan.device,
                precision=self.plan.precision,
                threads=self.plan.threads,
                kv=self.plan.kv,
                resident=self.plan.resident,
            ),
            vocab_size=sampled_size(self.tokenizer),
            max_tokens=self.plan.max_tokens * conversations,
            longest=self.plan.max_tokens,
            step_tokens=self.plan.step_tokens,
        )
        opened.release()

    @overload
    def generate(
        self,
        prompt_tokens: Sequence[int],
        stop_tokens: Collection[int] | None = None,
        temperature: float = 1.0,
        max_tokens: int | None = None,
        return_logprobs: Literal[False] = False,
        *,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int | None = None,
    ) -> Iterator[int]: ...

    @overload
    def generate(
        self,
        prompt_tokens: Sequence[int],
        stop_tokens: Collection[int] | None = None,
        temperature: float = 1.0,
        max_tokens: int | None = None,
        *,
        return_logprobs: Literal[True],
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int | None = None,
    ) -> Iterator[tuple[int, float]]: ...

    def generate(
        self,
        prompt_tokens: Sequence[int],
        stop_tokens: Collection[int] | None = None,
        temperature: float = 1.0,
        max_tokens: int | None = None,
        return_logprobs: bool = False,
        *,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int | None = None,
    ) -> Iterator[int] | Iterator[tuple[int, float]]:
        """Token ids, or (id, logprob) pairs, one by one; the stop token comes too.

        Args:
            stop_tokens: None for the vocabulary's own (return, call, endoftext).
            temperature: 0 takes the likeliest token always.
            max_tokens: most new tokens; None: until the room is full.
            seed: the same seed gives the same tokens on every backend; None draws one.

        Log-probabilities are the model's own, before temperature and filters. Leaving early ends
        the answer. For more (penalties, several answers, beams), ``engine.submit(Request(...))``.

        Raises (at once, not at the first token) ValueError for a bad argument and ContextExceeded
        for a prompt without room; while drawing, GptOssError for NaN logits.
        """
        request = self.request(
            prompt_tokens,
            stop_tokens,
            temperature,
            max_tokens,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            logprobs=0 if return_logprobs else None,
        )
        return self.pairs(request) if return_logprobs else self._ids(request)

    def request(
        self,
        prompt_tokens: Sequence[int],
        stop_tokens: Collection[int] | None = None,
        temperature: float = 1.0,
        max_tokens: int | None = None,
        *,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int | None = None,
        logprobs: int | None = None,
        boundaries: Sequence[int] = (),
    ) -> Request:
        """What ``generate`` asks of the engine, which will take it; arguments and errors as there.

        ``logprobs`` and ``boundaries``: see ``Request``.
        """
        stop = self.tokenizer.stop_tokens if stop_tokens is None else stop_tokens
        request = Request(
            prompt=prompt_tokens,
            sampling=Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p),
            seed=secrets.randbits(63) if seed is None else seed,
            stop_tokens=frozenset(stop),
            max_tokens=max_tokens,
            logprobs=logprobs,
            boundaries=boundaries,
        )
        self.engine.check(request)
        return request

    def recall(self, path: Path) -> int:
        """Know the prompt whose keys and values ``keep`` wrote -> how many tokens it has.

        What a later prompt begins with alike is not computed again.

        Raises:
            CheckpointError: the file is damaged, of another model, or of another way of running it.
            CacheFull: there is no room for so many tokens.
        """
        return self.engine.scheduler.prefixes.load(path, self._made())

    def keep(self, tokens: Sequence[int], path: Path) -> int:
        """Write the keys and values of what was computed of a prompt -> how many tokens that are.

        What was at ``path`` is replaced. Raises GptOssError if it cannot be written.
        """
        return self.engine.scheduler.prefixes.save(tokens, path, self._made())

    def _made(self) -> dict[str, str | None]:
        """All that keys and values depend on."""
        from importlib.metadata import version

        plan = self.plan
        return {
            "gptoss": version("gptoss"),
            "model": open_checkpoint(plan.path).fingerprint(),
            "backend": plan.backend,
            "device": plan.device,
            "dtype": plan.dtype,
            "precision": plan.precision,
            "kv": plan.kv,
        }

    def logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """What the model expects after each token: [T] -> [T, V]."""
        return self.engine.logits(tokens)

    def _ids(self, request: Request) -> Iterator[int]:
        with self.engine.submit(request) as stream:
            for drawn in stream:
                yield drawn.token

    def pairs(self, request: Request) -> Iterator[tuple[int, float]]:
        """What a request with log-probabilities draws."""
        with self.engine.submit(request) as stream:
            for drawn in stream:
                assert drawn.logprob is not None
                yield drawn.token, drawn.logprob


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The vocabulary beside the weights, else gpt-oss's own; checked against the model.

    Raises:
        TokenizerError: there is none, it is damaged, or it belongs to another model.
    """
    path, size = checkpoint.tokenizer_path, checkpoint.config.vocab_size
    if path is None and size < O200K_SIZE:
        raise TokenizerError(
            f"{checkpoint.path}: no tokenizer.json beside the weights, and with vocab_size {size} "
            f"the model cannot use gpt-oss's own vocabulary of {O200K_SIZE}"
        )
    tokenizer = Tokenizer.o200k_harmony() if path is None else Tokenizer.from_file(path)
    if tokenizer.vocab_size > size:
        raise TokenizerError(
            f"{path}: does not match the vocabulary of the model: it has ids up to "
            f"{tokenizer.vocab_size - 1}, but vocab_size is {size}"
        )
    if size - tokenizer.vocab_size > max(PADDING, size // 2):
        raise TokenizerError(
            f"{path or checkpoint.path}: does not match the vocabulary of the model: it has "
            f"{tokenizer.vocab_size} ids, but vocab_size is {size}"
        )
    if lacking := [n for n in NEEDED if f"<|{n}|>" not in tokenizer.specials]:
        raise TokenizerError(
            f"{path}: does not match the vocabulary of gpt-oss: it lacks <|{lacking[0]}|>"
        )
    return tokenizer


def sampled_size(tokenizer: Tokenizer) -> int:
    """Ids from here on mean nothing: nobody's, or reserved up to the end of the vocabulary."""
    size, names = tokenizer.vocab_size, {i: name for name, i in tokenizer.specials.items()}
    while RESERVED.fullmatch(names.get(size - 1, "")):
        size -= 1
    return size


def _counting(checkpoint: Checkpoint, progress: Progress | None) -> Callable[[str], Stored]:
    """``checkpoint.read`` that reports how far the backend has come."""
    if progress is None:
        return checkpoint.read
    done, total = 0, len(specs(checkpoint.config))

    def read(name: str) -> Stored:
        nonlocal done
        done += 1
        progress(done, total)
        return checkpoint.read(name)

    return read
