"""``LLM.load(model).chat(messages)``: words in, words out.

>>> from gptoss import LLM
>>> llm = LLM.load("nano")
>>> llm.chat("What is 17 + 25?", temperature=0).text
"""

import codecs
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypedDict, Unpack, overload

import numpy as np
import numpy.typing as npt

from gptoss.llm.plan import Plan
from gptoss.llm.reply import Reply, Stream
from gptoss.llm.tokens import Announce, Progress, TokenGenerator
from gptoss.text import harmony
from gptoss.text.messages import Developer, Effort, Message, Tool
from gptoss.text.parser import Parser

Conversation = str | Sequence[Message | Mapping[str, Any]]  # a string is one user message


class Options(TypedDict, total=False):
    """How to draw; see ``TokenGenerator.generate``. The defaults are gpt-oss's own."""

    temperature: float
    max_tokens: int | None  # of the answer
    top_k: int
    top_p: float
    min_p: float
    seed: int | None


class LLM:
    """A model and its vocabulary. One conversation at a time; not for several threads."""

    def __init__(self, tokens: TokenGenerator) -> None:
        """Around a model that is loaded; ``LLM.load`` loads one."""
        self.tokens = tokens
        self.tokenizer, self.config = tokens.tokenizer, tokens.config

    @classmethod
    def load(
        cls,
        model: str | Path = "nano",
        backend: str = "auto",
        dtype: str | None = None,
        device: str | None = None,
        max_tokens: int | None = None,
        *,
        precision: str | None = None,
        threads: int | None = None,
        kv: str | None = None,
        memory: int | None = None,
        conversations: int = 1,
        force: bool = False,
        announce: Announce | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Load "nano" (it is in the package), a checkpoint's path, or a Hugging Face id.

        Arguments and errors as ``TokenGenerator``.
        """
        return cls(
            TokenGenerator(
                model,
                backend,
                dtype=dtype,
                device=device,
                precision=precision,
                threads=threads,
                kv=kv,
                memory=memory,
                max_tokens=max_tokens,
                conversations=conversations,
                force=force,
                announce=announce,
                progress=progress,
            )
        )

    @property
    def plan(self) -> Plan:
        """How the model is run, why so, and what memory that takes."""
        return self.tokens.plan

    @overload
    def generate(
        self, prompt: str, *, stream: Literal[False] = False, **options: Unpack[Options]
    ) -> str: ...

    @overload
    def generate(
        self, prompt: str, *, stream: Literal[True], **options: Unpack[Options]
    ) -> Iterator[str]: ...

    def generate(
        self, prompt: str, *, stream: bool = False, **options: Unpack[Options]
    ) -> str | Iterator[str]:
        """Continue raw text, in which special tokens count. No harmony, no channels.

        The end token is not part of the answer; other special tokens appear as their text.
        """
        drawn = self.tokens.generate(self.tokenizer.encode_with_specials(prompt), **options)
        pieces = self.pieces(drawn)
        return pieces if stream else "".join(pieces)

    @overload
    def chat(
        self,
        messages: Conversation,
        *,
        effort: Effort = "medium",
        tools: Sequence[Tool | Mapping[str, Any]] = (),
        instructions: str | None = None,
        current_date: str | None = None,
        stream: Literal[False] = False,
        **options: Unpack[Options],
    ) -> Reply: ...

    @overload
    def chat(
        self,
        messages: Conversation,
        *,
        effort: Effort = "medium",
        tools: Sequence[Tool | Mapping[str, Any]] = (),
        instructions: str | None = None,
        current_date: str | None = None,
        stream: Literal[True],
        **options: Unpack[Options],
    ) -> Stream: ...

    def chat(
        self,
        messages: Conversation,
        *,
        effort: Effort = "medium",
        tools: Sequence[Tool | Mapping[str, Any]] = (),
        instructions: str | None = None,
        current_date: str | None = None,
        stream: bool = False,
        **options: Unpack[Options],
    ) -> Reply | Stream:
        """Answer a conversation: its messages, or one user message as text.

        To go on, append ``reply.messages`` and what comes next; after a tool call, that is
        ``{"role": "tool", "name": "functions.NAME", "content": result}``. System and developer
        messages are put in front (see ``harmony.with_defaults``).

        Returns:
            The reply, or with ``stream`` its deltas as they come and the reply behind them.
        """
        turns = conversation(
            messages,
            effort=effort,
            instructions=instructions,
            tools=tools,
            current_date=current_date,
        )
        arriving = self._answer(turns, options)
        if not stream:
            for _ in arriving:
                pass
        return arriving if stream else arriving.reply

    def logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """What the model expects after each token: [T] -> [T, V]. For teacher forcing."""
        return self.tokens.logits(tokens)

    def prompt(self, turns: Sequence[Message]) -> list[int]:
        """The tokens of a whole conversation (see ``conversation``), up to the model's turn."""
        return harmony.render_for_completion(turns, self.tokenizer)

    def boundaries(self, prompt: Sequence[int]) -> list[int]:
        """Where a later prompt may leave this one: see ``Request.boundaries``.

        Before the first user message, for other conversations with the same instructions; and
        behind the last, for there the thoughts begin that a later turn leaves out.
        """
        start, user = self.tokenizer.special("<|start|>"), self.tokenizer.encode("user")
        starts = [i for i, token in enumerate(prompt) if token == start]
        asked = [i for i in starts if list(prompt[i + 1 : i + 1 + len(user)]) == user]
        behind = [i for i in starts if asked and i > asked[-1]]
        return [i for i in (*asked[:1], *behind[:1]) if i]

    def _answer(self, turns: list[Message], options: Options) -> Stream:
        prompt = self.prompt(turns)
        request = self.tokens.request(prompt, boundaries=self.boundaries(prompt), **options)
        parser = Parser(self.tokenizer, tools=tool_names(turns))
        return Stream(request, self.tokens.engine.submit, parser)

    def pieces(self, drawn: Iterator[int]) -> Iterator[str]:
        """Text of raw tokens, up to the end token, as soon as its characters are complete."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in drawn:
            if token in self.tokenizer.stop_tokens:
                break
            if text := decoder.decode(self.tokenizer.decode_bytes([token])):
                yield text
        if text := decoder.decode(b"", final=True):
            yield text


def conversation(
    messages: Conversation,
    *,
    effort: Effort = "medium",
    tools: Sequence[Tool | Mapping[str, Any]] = (),
    instructions: str | None = None,
    current_date: str | None = None,
) -> list[Message]:
    """All messages that the model is to read; a string is a user's."""
    turns = [Message(role="user", content=messages)] if isinstance(messages, str) else messages
    whole = harmony.with_defaults(
        turns, effort=effort, instructions=instructions, tools=tools, current_date=current_date
    )
    return harmony.without_old_thoughts(whole)


def tool_names(messages: Sequence[Message]) -> list[str]:
    """The functions that the conversation offers."""
    return [
        tool.name
        for message in messages
        if isinstance(message.content, Developer)
        for tool in message.content.tools
    ]
