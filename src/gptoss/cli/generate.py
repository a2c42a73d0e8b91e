"""``gptoss generate``: one answer.

gptoss generate -p "What is 17 + 25?"
echo "Why is the sky blue?" | gptoss generate openai/gpt-oss-20b --effort low
gptoss generate -p "What is 17 + 25?" --trace a.npz
gptoss generate openai/gpt-oss-20b -p "$(cat paper.txt) In one word?" --prompt-cache paper.cache
gptoss generate checkpoints/20b --raw -p "Once upon a time" -l 50 --logprobs
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from gptoss.cli import options
from gptoss.cli.arguments import Option, WrongCommandLine
from gptoss.cli.endings import usage
from gptoss.cli.terminal import Screen, decoded, shown, typed
from gptoss.cli.tracing import Tracing
from gptoss.errors import GptOssError

if TYPE_CHECKING:
    from gptoss.llm import LLM
    from gptoss.llm.llm import Options
    from gptoss.text.messages import Effort


def run(
    model: options.Model = "nano",
    prompt: Annotated[
        str | None, Option("-p", "--prompt", help='the prompt; "-" or nothing: stdin')
    ] = None,
    raw: Annotated[
        bool, Option("--raw", help="continue the text itself; special tokens count")
    ] = False,
    logprobs: Annotated[
        bool, Option("--logprobs", help="a line per token: id, log-probability, text")
    ] = False,
    json_: options.Json = False,
    effort: options.Effort = "medium",
    prompt_cache: Annotated[
        Path | None,
        Option(
            "--prompt-cache", help="a file of the last prompt's keys and values: read, replaced"
        ),
    ] = None,
    *,
    drawing: options.Drawing,
    loading: options.Loading,
    tracing: Tracing,
) -> None:
    """Answer a prompt: thoughts on stderr, the answer on stdout."""
    how = drawing.checked()
    text = read_prompt(prompt)
    llm = loading.load(model)
    with usage():
        tokens = prompt_tokens(llm, text, None if raw else effort)
    with tracing.of(llm, model), kept(llm, tokens, prompt_cache, quiet=loading.quiet):
        if raw or logprobs:
            with usage():
                end = () if prompt_cache is None else (len(tokens),)
                request = llm.tokens.request(tokens, logprobs=0, boundaries=end, **how)
            drawn = llm.tokens.pairs(request)
            (print_json if json_ else print_logprobs if logprobs else print_text)(llm, drawn)
        else:
            answer(llm, text, effort, how, json_)


@contextmanager
def kept(llm: LLM, prompt: list[int], path: Path | None, *, quiet: bool) -> Iterator[None]:
    """What ``path`` holds is not computed again; afterwards it holds this prompt."""
    if path is None:
        yield
        return
    if path.exists():
        llm.tokens.recall(path)
    elif not os.access(path.parent, os.W_OK):  # said before hours are spent on a prompt
        raise GptOssError(f"{path}: cannot be written: {path.parent} is no folder to write to")
    before = llm.tokens.engine.stats.reused
    yield
    read = llm.tokens.engine.stats.reused - before
    written = llm.tokens.keep(prompt, path)
    now = f"{written} are now" if written else "as before: no room for a copy, see --context"
    if not (quiet and written):
        print(f"{path}: {read} of {len(prompt)} tokens were there, {now}", file=sys.stderr)


def read_prompt(given: str | None) -> str:
    """The option's text, or stdin without its last line end. Raises GptOssError if not UTF-8."""
    if given is None and sys.stdin.isatty():
        raise WrongCommandLine("there is no prompt: give -p TEXT, or pipe it in")
    if given in (None, "-"):
        text = decoded(sys.stdin.buffer.read(), "stdin").removesuffix("\n")
    else:
        assert given is not None
        text = typed(given, "--prompt")
    if not text:
        raise WrongCommandLine("the prompt is empty")
    return text


def prompt_tokens(llm: LLM, text: str, effort: Effort | None) -> list[int]:
    """The text itself, or (with an effort) as a user's message."""
    from gptoss.llm.llm import conversation

    if effort is None:
        return llm.tokenizer.encode_with_specials(text)
    return llm.prompt(conversation(text, effort=effort))


def answer(llm: LLM, text: str, effort: Effort, how: Options, as_json: bool) -> None:
    """The prompt as a user's message, answered through harmony."""
    with usage():
        stream = llm.chat(text, effort=effort, stream=True, **how)
    screen = Screen()
    for delta in stream:
        if not as_json:
            screen.show(delta)
    screen.end()
    reply = stream.reply
    if as_json:
        print(json.dumps(reply.to_json(), ensure_ascii=False))
    elif not reply.text:
        screen.note(f"no final answer in {reply.usage.completion} tokens, only what is above")
    elif reply.finish_reason == "length":
        screen.note(f"cut off after {reply.usage.completion} tokens")


def print_text(llm: LLM, drawn: Iterator[tuple[int, float]]) -> None:
    """The continuation as it comes."""
    screen = Screen()
    for piece in llm.pieces(token for token, _ in drawn):
        screen.say(piece)
    screen.end()


def print_logprobs(llm: LLM, drawn: Iterator[tuple[int, float]]) -> None:
    """A line per token."""
    for token, logprob in drawn:
        text = json.dumps(llm.tokenizer.decode([token]), ensure_ascii=False)
        print(f"{token:>6}  {logprob:9.4f}  {shown(text, sys.stdout)}", flush=True)


def print_json(llm: LLM, drawn: Iterator[tuple[int, float]]) -> None:
    """Everything at the end, in one document."""
    pairs = list(drawn)
    tokens: list[dict[str, Any]] = [
        {"id": token, "logprob": logprob, "text": llm.tokenizer.decode([token])}
        for token, logprob in pairs
    ]
    text = "".join(llm.pieces(iter([token for token, _ in pairs])))
    print(json.dumps({"text": text, "tokens": tokens}, ensure_ascii=False))
