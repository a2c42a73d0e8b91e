"""``gptoss chat``: a conversation in the terminal, or a line per message from a pipe.

gptoss chat
gptoss chat openai/gpt-oss-20b --effort high --instructions "Answer in French."
gptoss chat openai/gpt-oss-20b --tool python --tool browser=./papers
printf '2+2?\nand doubled?\n' | gptoss chat --quiet
"""

from __future__ import annotations

import sys
from contextlib import suppress
from datetime import date
from typing import TYPE_CHECKING, Annotated, get_args

from gptoss.cli import options
from gptoss.cli.arguments import Option
from gptoss.cli.terminal import Screen, decoded, typed
from gptoss.cli.tools import Tools
from gptoss.cli.tracing import Tracing
from gptoss.errors import ContextExceeded

if TYPE_CHECKING:
    from gptoss.llm import LLM, Reply
    from gptoss.llm.llm import Options
    from gptoss.text.messages import Effort, Message
    from gptoss.tools import Rounds, Toolbox

HELP = "/effort low|medium|high, /reset forgets all, /quit; to say /word, write //word"


def run(
    model: options.Model = "nano",
    effort: options.Effort = "medium",
    instructions: Annotated[str | None, Option(help="what the developer tells the model")] = None,
    *,
    tools: Tools,
    drawing: options.Drawing,
    loading: options.Loading,
    tracing: Tracing,
) -> None:
    """Talk with the model. Ctrl-C stops an answer, Ctrl-D ends the conversation."""
    how = drawing.checked()
    if instructions is not None:
        instructions = typed(instructions, "--instructions")
    with tools.box() as box:
        llm = loading.load(model)
        chat = Chat(llm, effort, instructions, how, box)
        if sys.stdin.isatty() and not loading.quiet:
            chat.screen.note(HELP)
        with tracing.of(llm, model):
            converse(chat)


def converse(chat: Chat) -> None:
    """Line by line."""
    while (line := ask(chat.screen)) is not None:
        try:
            if not chat.take(line):
                break
        except KeyboardInterrupt:  # before the first word
            if not sys.stdin.isatty():
                raise
            chat.screen.note("stopped")


class Chat:
    """A conversation and how it is held."""

    def __init__(
        self,
        llm: LLM,
        effort: Effort,
        instructions: str | None,
        how: Options,
        box: Toolbox | None = None,
    ) -> None:
        self.llm, self.effort, self.instructions, self.how = llm, effort, instructions, how
        self.turns: list[Message] = []
        self.screen = Screen()
        self.box = box
        self.session = box.open(list(box.kits)) if box else None

    def take(self, line: str) -> bool:
        """Answer a line or do what it says; False when that is to leave."""
        word, _, argument = line.strip().partition(" ")
        if not word:
            return True
        if not word.startswith("/") or word.startswith("//"):
            self.answer(line.lstrip().removeprefix("/") if word.startswith("//") else line)
        elif word == "/effort" and argument in get_args(options.Level):
            self.effort = argument  # type: ignore[assignment]
        elif word == "/reset":
            self.turns.clear()
            if self.box and self.session:
                self.session.close()
                self.session = self.box.open(list(self.box.kits))
        elif word == "/quit":
            return False
        else:
            self.screen.note(HELP)
        return True

    def answer(self, text: str) -> None:
        """One turn. What was cut off before a final answer is taken back, the question with it."""
        from gptoss.text.messages import Message

        asked = [*self.turns, Message(role="user", content=text)]
        rounds = self.session.rounds() if self.session else None
        try:
            while True:
                reply = self.speak(asked)
                asked += reply.messages
                called = rounds is not None and reply.finish_reason == "tool_calls"
                call = rounds.next(reply.messages) if rounds and called else None
                if rounds is None or call is None:
                    break
                asked.append(self.run_tool(rounds, call))
        except ContextExceeded as error:
            if not sys.stdin.isatty():
                raise
            self.screen.note(f"{error}; /reset forgets all")
            return
        if reply.text:
            self.turns = asked
        self.remark(reply)

    def run_tool(self, rounds: Rounds, call: Message) -> Message:
        """What it answered, shown; Ctrl-C stops it."""
        running = rounds.run(call)
        try:
            result = running.result()
        finally:
            running.cancel()
        self.screen.result(call.recipient or "", result.text)
        return result.message

    def speak(self, asked: list[Message]) -> Reply:
        """What the model says next, shown as it comes."""
        if self.box:
            asked = self.box.offered(self.whole(asked), list(self.box.kits))
        stream = self.llm.chat(
            asked,
            effort=self.effort,
            instructions=None if self.box else self.instructions,
            current_date=date.today().isoformat(),
            stream=True,
            **self.how,
        )
        try:
            for delta in stream:
                self.screen.show(delta)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            self.screen.note("stopped")
        self.screen.end()
        return stream.reply

    def whole(self, asked: list[Message]) -> list[Message]:
        """The conversation with the messages in front that tools are told of in."""
        from gptoss.llm.llm import conversation

        return conversation(
            asked,
            effort=self.effort,
            instructions=self.instructions,
            current_date=date.today().isoformat(),
        )

    def remark(self, reply: Reply) -> None:
        """Say what is odd about an answer."""
        if not reply.text:
            self.screen.note("no final answer; the question is taken back")
        elif reply.finish_reason == "length":
            self.screen.note("cut off")


def ask(screen: Screen) -> str | None:
    """The next line; None at the end. A second Ctrl-C in a row leaves."""
    if not sys.stdin.isatty():
        line = sys.stdin.buffer.readline()
        return decoded(line, "stdin").rstrip("\r\n") if line else None
    with suppress(ImportError):
        import readline  # noqa: F401  (it gives input() history and editing)
    for chance in (1, 2):
        try:
            if not sys.stdout.isatty():  # answers go to a file: the prompt is not one
                print("> ", end="", file=sys.stderr, flush=True)
            return typed(input("> " if sys.stdout.isatty() else ""), "stdin")
        except EOFError:
            screen.end()
            print(file=sys.stderr)
            return None
        except KeyboardInterrupt:
            print(file=sys.stderr)
            if chance == 2:
                raise
            screen.note("Ctrl-C again, Ctrl-D or /quit leaves")
    raise AssertionError("unreachable")
