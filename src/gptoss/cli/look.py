"""``gptoss look``: watch the model answer, token by token and layer by layer.

gptoss look "What is 247 + 385?" -o look.html
gptoss look --conversation turns.json ~/gpt-oss-20b --png plots
gptoss look --text "Once upon a time" nano
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from gptoss.cli import options
from gptoss.cli.arguments import Argument, Option, WrongCommandLine
from gptoss.cli.endings import usage
from gptoss.cli.terminal import Screen, bar, decoded, typed
from gptoss.cli.tracing import writable
from gptoss.errors import GptOssError

if TYPE_CHECKING:
    from gptoss.llm import LLM
    from gptoss.llm.llm import Options
    from gptoss.text.messages import Effort, Message


def run(
    prompt: Annotated[str | None, Argument(help="what the model is asked")] = None,
    model: options.Model = "nano",
    out: Annotated[str, Option("-o", "--out", help="the page to write")] = "look.html",
    png: Annotated[str | None, Option(help="a directory for plots, as PNG")] = None,
    conversation: Annotated[
        str | None, Option(help="a JSON file of messages, in place of PROMPT")
    ] = None,
    text: Annotated[
        bool, Option("--text", help="PROMPT is the text to look at; special tokens count")
    ] = False,
    effort: options.Effort = "medium",
    *,
    drawing: options.Drawing,
    loading: options.Loading,
) -> None:
    """One page that shows what the model did with each token, and what it thought of instead."""
    from gptoss.checkpoint.open import open_checkpoint
    from gptoss.checkpoint.staged import staged_file
    from gptoss.llm.models import resolve
    from gptoss.sight.look import look
    from gptoss.sight.page import page

    how, path = drawing.checked(), Path(out)
    if conversation is not None and prompt is not None:  # the one word is then the model's
        if model not in ("nano", os.environ.get("GPTOSS_MODEL")):
            raise WrongCommandLine(f"--conversation stands in PROMPT's place: leave out {prompt!r}")
        model, prompt = prompt, None
    turns = asked(prompt, conversation, text, effort)
    writable(path, "--out")
    if png is not None:
        from gptoss.sight.plots import need_matplotlib

        need_matplotlib()
        if os.path.exists(png) and not os.path.isdir(png):
            raise GptOssError(f"{png}: is no directory; --png names one")
    llm = loading.load(model)
    with usage():
        tokens = read(llm, prompt, turns, how)
    with bar("looking") as progress:
        weights = open_checkpoint(resolve(model)).read
        sight = look(llm.tokens.engine.backend, weights, tokens, progress)
    with staged_file(path) as file:
        title = f"{Path(model).name}: {len(tokens)} tokens"
        file.write(page(sight, llm.tokenizer, title).encode())
    print(path)
    if png is not None:
        from gptoss.sight.plots import plots

        for plot in plots(sight, llm.tokenizer, Path(png)):
            print(plot)


def asked(
    prompt: str | None, conversation: str | None, text: bool, effort: Effort
) -> list[Message] | None:
    """The messages to look at, None for a text."""
    from gptoss.text.harmony import with_defaults

    if conversation is None:
        if not prompt:
            raise WrongCommandLine("there is nothing to look at: give PROMPT or --conversation")
        question = {"role": "user", "content": typed(prompt, "PROMPT")}
        return None if text else with_defaults([question], effort=effort)
    if text:
        raise WrongCommandLine("--text reads PROMPT, not a --conversation")
    try:
        found = json.loads(decoded(Path(conversation).read_bytes(), conversation))
        if not isinstance(found, list) or not found:
            raise ValueError("expected a list of messages")
        return with_defaults(found, effort=effort)
    except (ValueError, RecursionError) as error:
        raise GptOssError(f"{conversation}: {error}") from None


def read(llm: LLM, prompt: str | None, turns: list[Message] | None, how: Options) -> list[int]:
    """All tokens: those of the text or the messages, and of the answer that they wait for."""
    from gptoss.text import harmony
    from gptoss.text.parser import Delta, Parser

    if turns is None:
        return llm.tokenizer.encode_with_specials(typed(prompt or "", "PROMPT"))
    if turns[-1].role == "assistant":
        return harmony.render_for_training(turns, llm.tokenizer, keep_analysis=True)
    tokens = llm.prompt(harmony.without_old_thoughts(turns))
    parser, screen = Parser(llm.tokenizer), Screen()
    for token in llm.tokens.generate(list(tokens), **how):
        tokens.append(token)
        for event in parser.push(token):
            if isinstance(event, Delta):
                screen.show(event)
    screen.end()
    return tokens
