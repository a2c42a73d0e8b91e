"""Answers to learn from, drawn by our own engine from the very weights that are trained.

The answers to one prompt fork its cache. Which numbers draw them is a function of the run's seed,
the round and the prompt, so a round that is drawn again comes out the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gptoss.backends.protocol import Backend, Sampling
from gptoss.backends.torch.backend import TorchBackend
from gptoss.backends.torch.modules import Transformer
from gptoss.engine import Answer as Drawn
from gptoss.engine import Engine, Request
from gptoss.engine.draw import philox
from gptoss.llm.llm import tool_names
from gptoss.llm.tokens import sampled_size
from gptoss.text import harmony
from gptoss.text.messages import Message
from gptoss.text.parser import parse
from gptoss.text.tokenizer import STOP_NAMES, Tokenizer
from gptoss.train.batch import IGNORE, Document
from gptoss.train.conversation import KNOWN, messages_of
from gptoss.train.objective import Rollouts
from gptoss.train.quantize import unchanging
from gptoss.train.replay import Chosen, Recorder
from gptoss.train.reward import Rewards

STEP_TOKENS = 512  # new tokens in one forward pass of the sampler


@dataclass(frozen=True, slots=True)
class Prompt(Document):
    """What is asked: a line of a data file."""

    messages: list[Message]
    example: dict[str, Any]  # the line itself


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer to a prompt."""

    prompt: Prompt
    tokens: list[int]  # what the model said, the stop token included
    logprobs: list[float]  # of each, as the sampler had it
    truncated: bool  # the limit came before the end
    messages: list[Message]
    reward: float
    parts: dict[str, float]  # each reward before its weight
    chosen: Chosen | None = None  # [T, L, k] of the document's tokens, where it was recorded

    @property
    def document(self) -> Document:
        """The answer as the trainer reads it: prompt and answer, the answer learned."""
        tokens = [*self.prompt.tokens, *self.tokens]
        given = [IGNORE] * (len(self.prompt.tokens) - 1)
        return Document(tokens[:-1], [*given, *self.tokens], self.prompt.origin)


def prompt(raw: Any, tokenizer: Tokenizer, origin: str, *, room: int) -> Prompt:
    """One line's JSON: a conversation up to the model's turn, and ``answer`` where there is one.

    Raises ValueError: it is no such conversation, or it leaves no room for an answer.
    """
    if not isinstance(raw, Mapping):
        raise ValueError(f"expected a JSON object, found {type(raw).__name__}")
    known = ("answer", *(key for key in KNOWN if key != "text"))
    if unknown := [key for key in raw if key not in known]:
        raise ValueError(f"{unknown[0]!r} is none of {', '.join(known)}; the rest goes under meta")
    messages = messages_of(raw)
    if messages[-1].role == "assistant":
        raise ValueError("messages: the last one must not be the model's: that is to be drawn")
    messages = harmony.without_old_thoughts(messages)
    tokens = harmony.render_for_completion(messages, tokenizer, keep_analysis=True)
    if len(tokens) >= room:
        raise ValueError(f"it has {len(tokens)} tokens; an answer needs room within {room}")
    return Prompt(tokens, [IGNORE] * len(tokens), origin, messages, dict(raw))


class Sampler:
    """Draws answers from a model that is being trained, and has them judged.

    ``backend``: runs the model's own tensors; by default as the trainer does.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        rewards: Rewards,
        rollouts: Rollouts,
        *,
        autocast: bool = False,
        backend: Backend | None = None,
    ) -> None:
        self.autocast = torch.autocast(
            model.embedding.weight.device.type, torch.bfloat16, enabled=autocast
        )
        self.model, self.tokenizer = model, tokenizer
        self.backend = backend or TorchBackend.of(model)
        self.rewards, self.rollouts = rewards, rollouts
        self.words = sampled_size(tokenizer)  # ids from here on are never drawn
        self.stops = frozenset(tokenizer.specials[name] for name in STOP_NAMES)

    def draw(
        self, prompts: Sequence[Prompt], seed: int, *, first: int = 0, greedy: bool = False
    ) -> list[Answer]:
        """``rollouts.group`` answers to each prompt, one prompt after another; greedy: one.

        ``first``: how many prompts others draw answers to, with the same seed.

        Raises TrainingError for a reward that raises, and what the engine ends a request with.
        """
        most, group = self.rollouts.max_tokens, 1 if greedy else self.rollouts.group
        rows = min(self.rollouts.rows, len(prompts) * group)
        longest = max(len(prompt.tokens) for prompt in prompts) + most
        recorder = Recorder(self.backend) if self.rollouts.replay_routing else None
        engine = Engine(
            recorder or self.backend,
            vocab_size=self.words,
            max_tokens=rows * longest,
            step_tokens=max(STEP_TOKENS, rows),
            rows=rows,
        )
        streams = [
            engine.submit(
                Request(
                    prompt=prompt.tokens,
                    sampling=Sampling(temperature=0.0 if greedy else 1.0),
                    seed=philox(seed, first + i),
                    stop_tokens=self.stops,
                    max_tokens=most,
                    n=group,
                    logprobs=0,
                    remember=False,
                    speculate=False,  # so that what is computed together is always the same
                )
            )
            for i, prompt in enumerate(prompts)
        ]
        with self.autocast, unchanging(self.model):
            while engine.step():
                pass
        for stream in streams:
            if stream.error is not None:
                raise stream.error
        return [
            self._judged(prompt, answer, recorder)
            for prompt, stream in zip(prompts, streams, strict=True)
            for answer in stream.answers
        ]

    def _judged(self, prompt: Prompt, drawn: Drawn, recorder: Recorder | None) -> Answer:
        truncated = drawn.finish == "length"
        tools = tool_names(prompt.messages)
        messages = parse(drawn.tokens, self.tokenizer, tools=tools)
        reward, parts = self.rollouts.truncated, dict.fromkeys(self.rewards.names, 0.0)
        if not truncated:
            reward, parts = self.rewards(prompt.messages, messages, prompt.example, prompt.origin)
        logprobs = [d.logprob for d in drawn.drawn if d.logprob is not None]
        read = [*prompt.tokens, *drawn.tokens[:-1]]
        chosen = None if recorder is None else recorder.chosen(read)
        return Answer(prompt, drawn.tokens, logprobs, truncated, messages, reward, parts, chosen)
