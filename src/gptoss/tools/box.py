"""The tools that are switched on, and the rounds in which they answer until the model does.

Tools run in an event loop of their own, so that a server, which has one, and a terminal, which has
none, use them alike; both drive a turn so:

    rounds = box.open(names).rounds()
    while call := rounds.next(what the model said):
        result = rounds.run(call).result()  # or: await asyncio.wrap_future(...)
        ... the model reads all it said and ``result.message``, and speaks again
"""

import asyncio
import logging
import time
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Any, Self, TypeVar

from gptoss.text.messages import Developer, Message, System
from gptoss.text.tools import PATH, WORD
from gptoss.tools.apply_patch import ApplyPatch
from gptoss.tools.browser import Browser
from gptoss.tools.call import Kit, Opened, ToolError
from gptoss.tools.folder import Folder
from gptoss.tools.mcp import McpServer
from gptoss.tools.python import Python
from gptoss.tools.sandbox import Sandbox

MOST_CALLS = 64  # of one turn
STUBBORN = 3  # calls beyond the last one, after which the turn ends without an answer
ENOUGH = "No more calls can be made in this turn. Answer with what you have."
ENDING = 5.0  # seconds for what must be closed
MOST_SECONDS = 900.0  # that the tools of one turn may take together
T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a call."""

    message: Message  # for the model
    failed: bool  # the message says why

    @property
    def text(self) -> str:
        """What the model is told."""
        assert isinstance(self.message.content, str)
        return self.message.content


def kit(said: str) -> Kit:
    """Of "python", "python=INTERPRETER", "browser=FOLDER", "apply_patch=FOLDER". ValueError."""
    name, _, where = said.partition("=")
    match name:
        case "python":
            return Python(Sandbox(python=where or None))
        case "browser" if where:
            return Browser(Folder(Path(where).expanduser()))
        case "apply_patch" if where:
            return ApplyPatch(Path(where).expanduser())
    raise ValueError(
        f"{said!r} is none of python, python=INTERPRETER, browser=FOLDER and apply_patch=FOLDER"
    )


def mcp_server(said: str) -> McpServer:
    """Of "NAME=COMMAND" or "NAME=URL". Raises ValueError."""
    name, _, where = said.partition("=")
    if not where.strip() or not WORD.fullmatch(name) or name in ("python", "browser"):
        raise ValueError(f"{said!r} is no NAME=COMMAND or NAME=URL; a name has letters and digits")
    return McpServer(name, where.strip())


class Toolbox:
    """Tools by name; a context in which they can be used."""

    def __init__(self, kits: Sequence[Kit]) -> None:
        """Raises ValueError: two have one name."""
        self.kits = {kit.name: kit for kit in kits}
        names = [kit.name for kit in kits]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two tools are called {twice[0]!r}")
        self._loop = asyncio.new_event_loop()
        self.sessions: set[Session] = set()  # that are not closed
        self._thread = Thread(target=self._loop.run_forever, name="tools", daemon=True)

    def __enter__(self) -> Self:
        """Start them. Raises ToolUnavailable."""
        self._thread.start()
        try:
            for kit in self.kits.values():
                self.submit(kit.start()).result()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for session in list(self.sessions):
            session.close()
        for kit in self.kits.values():
            self.submit(kit.stop()).result()
        self.submit(_rest()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def submit(self, work: Coroutine[Any, Any, T]) -> "Future[T]":
        """Let it run among the tools."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def offered(self, messages: Sequence[Message], names: Sequence[str]) -> list[Message]:
        """A whole conversation, its system and developer messages completed by these tools.

        Raises ValueError: a function of the caller's has the name of one of them.
        """
        offers = [self.kits[name].offer for name in names]
        functions = [function for offer in offers for function in offer.functions]
        told = [offer.instructions for offer in offers if offer.instructions]
        turns = list(messages)
        system = next(i for i, m in enumerate(turns) if isinstance(m.content, System))
        content = turns[system].content
        assert isinstance(content, System)
        builtin = (*content.builtin_tools, *(o.builtin for o in offers if o.builtin))
        turns[system] = replace(turns[system], content=replace(content, builtin_tools=builtin))
        if not functions and not told:
            return turns
        at = next((i for i, m in enumerate(turns) if isinstance(m.content, Developer)), None)
        if at is None:
            at = system + 1
            turns.insert(at, Message(role="developer", content=Developer()))
        developer = turns[at].content
        assert isinstance(developer, Developer)
        tools = (*developer.tools, *functions)
        known = [tool.name for tool in tools]
        if twice := [name for name in known if known.count(name) > 1]:
            raise ValueError(f"tools: two have the name {twice[0]!r}")
        said = "\n\n".join([*filter(None, [developer.instructions]), *told]) or None
        turns[at] = replace(turns[at], content=Developer(instructions=said, tools=tools))
        return turns

    def open(self, names: Sequence[str]) -> "Session":
        """For one conversation."""
        session = Session(self, names)
        self.sessions.add(session)
        return session


class Session:
    """The tools of one conversation. Close it; what it started ends then."""

    def __init__(self, box: Toolbox, names: Sequence[str]) -> None:
        self._box = box
        self._opened: dict[str, Opened] = {name: box.kits[name].open() for name in names}
        self._running: set[Future[Result]] = set()
        self._functions = {
            f"functions.{function.name}": name
            for name in names
            for function in box.kits[name].offer.functions
        }

    def owner(self, recipient: str | None) -> str | None:
        """Which of these tools a call is for; None: it is somebody else's."""
        if recipient is None or not PATH.fullmatch(recipient):
            return None
        top = recipient.partition(".")[0]
        builtin = top if top in ("python", "browser") and top in self._opened else None
        return self._functions.get(recipient, builtin)

    def rounds(self, most: int | None = None) -> "Rounds":
        """For one turn; ``most``: calls at most, no more than ``MOST_CALLS``."""
        return Rounds(self, min(MOST_CALLS, MOST_CALLS if most is None else most))

    def run(self, call: Message, seconds: float) -> "Future[Result]":
        """The answer to a call. It does not fail; cancelling it ends what the tool does."""
        result = self._box.submit(self._answer(call, seconds))
        self._running.add(result)
        result.add_done_callback(self._running.discard)
        return result

    def close(self) -> None:
        """Stop what runs and free all they hold, soon; a second time nothing happens."""
        if self not in self._box.sessions:
            return
        self._box.sessions.discard(self)
        for result in list(self._running):
            result.cancel()
        for opened in self._opened.values():
            self._box.submit(opened.close())

    async def _answer(self, call: Message, seconds: float) -> Result:
        recipient, failed = call.recipient, True
        owner = self.owner(recipient)
        assert owner is not None and recipient is not None and isinstance(call.content, str)
        try:
            async with asyncio.timeout(max(seconds, 0.0)):
                said = await self._opened[owner].call(recipient, call.content)
            failed = False
        except ToolError as error:
            said = str(error)
        except TimeoutError:
            said = "The tools took too long in this turn; answer with what you have."
        except Exception as error:
            log.exception("the tool %s failed", owner)
            said = f"The tool failed ({type(error).__name__})."
        return _result(call, said, failed=failed)


class Rounds:
    """One turn: what the model calls is run until it answers, or has called often enough."""

    def __init__(self, session: Session, most: int) -> None:
        self._session, self._left = session, most
        self._end = time.monotonic() + MOST_SECONDS

    @property
    def over(self) -> bool:
        """Whether the model should answer without another call."""
        return self._left <= 0 or time.monotonic() >= self._end

    def next(self, said: Sequence[Message]) -> Message | None:
        """The call with which the model's turn ended, if there is one and it is to be run."""
        last = said[-1] if said else None
        if last is None or self._session.owner(last.recipient) is None:
            return None
        return last if self._left > -STUBBORN else None

    def run(self, call: Message, seconds: float = MOST_SECONDS) -> "Future[Result]":
        """See Session.run; too late, and the model is only told so."""
        over = self.over
        self._left -= 1
        if over:
            told: Future[Result] = Future()
            told.set_result(_result(call, ENOUGH, failed=True))
            return told
        return self._session.run(call, min(seconds, self._end - time.monotonic()))


def _result(call: Message, said: str, *, failed: bool) -> Result:
    message = Message(
        role="tool",
        name=call.recipient,
        recipient="assistant",
        channel=call.channel or "commentary",
        content=said,
    )
    return Result(message, failed)


async def _rest() -> None:
    """Let what was begun come to its end, and soon."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    _, late = await asyncio.wait(others, timeout=ENDING) if others else (None, [])
    for task in late:
        task.cancel()
    await asyncio.gather(*late, return_exceptions=True)
