"""Tools of MCP servers (https://modelcontextprotocol.io), as functions of the model.

A server is a command, talked to over its stdin and stdout, or a URL (streamable HTTP). Its tools
are named SERVER_TOOL. One that dies is started again by the next call.
"""

import asyncio
import json
import os
import re
import shlex
from contextlib import suppress
from typing import Any, TextIO

from gptoss.errors import ToolUnavailable
from gptoss.text.messages import Tool
from gptoss.tools.call import Offer, ToolError, shortened

CALL, START = 120.0, 30.0  # seconds
MOST_TEXT = 20_000  # characters of an answer
MOST_TOOLS = 256


class McpServer:
    """One server; as it keeps its own state, it is the same in all conversations."""

    def __init__(self, name: str, where: str) -> None:
        """``where``: a URL, or a command with its arguments."""
        self.name, self._where = name, where
        self.offer = Offer()
        self._tools: dict[str, str] = {}  # the model's name -> the server's
        self._client: Any = None  # while it is connected
        self._living: asyncio.Task[None] | None = None
        self._enough, self._connecting = asyncio.Event(), asyncio.Lock()

    async def start(self) -> None:
        """See Kit.start."""
        try:
            await self._connect()
            async with asyncio.timeout(START):
                listed = await self._listed()
        except ToolError as error:
            raise ToolUnavailable(str(error)) from None
        except Exception as error:
            raise ToolUnavailable(f"MCP server {self.name}: {_reason(error)}") from None
        functions = tuple(self._function(tool) for tool in listed)
        if len(self._tools) != len(functions):
            raise ToolUnavailable(f"MCP server {self.name}: two tools have one name for the model")
        self.offer = Offer(functions=functions)

    def open(self) -> "McpServer":
        """See Kit.open."""
        return self

    async def call(self, recipient: str, text: str) -> str:
        """See Opened.call."""
        name = self._tools[recipient.removeprefix("functions.")]
        arguments = _arguments(text)
        await self._connect()
        call = asyncio.ensure_future(self._client.call_tool(name, arguments))
        assert self._living is not None
        try:
            await asyncio.wait({call, self._living}, timeout=CALL, return_when="FIRST_COMPLETED")
            if not call.done():
                late = f"{name} took longer than {CALL:.0f} seconds"
                raise ToolError(f"the MCP server {self.name} ended" if self._over else late)
            answered = call.result()
        except ToolError:
            raise
        except Exception as error:
            if _gone(error):
                await self.stop()
                raise ToolError(f"the MCP server {self.name} ended during the call") from None
            raise ToolError(f"{name} of MCP server {self.name}: {_reason(error)}") from None
        finally:
            call.cancel()
        said = shortened("\n".join(map(_text, answered.content)), MOST_TEXT)
        if answered.is_error:
            raise ToolError(said or "the tool failed and does not say why")
        return said or "(no output)"

    async def close(self) -> None:
        """See Opened.close."""

    async def stop(self) -> None:
        """See Kit.stop."""
        self._enough.set()
        if self._living is not None:
            with suppress(Exception):
                await self._living

    @property
    def _over(self) -> bool:
        return self._living is None or self._living.done()

    async def _connect(self) -> None:
        """Be connected. Raises ToolError."""
        async with self._connecting:
            if self._over:
                await self._begin()

    async def _begin(self) -> None:
        self._enough = asyncio.Event()
        ready = asyncio.Event()
        self._living = asyncio.create_task(self._live(ready))
        waiting = asyncio.ensure_future(ready.wait())
        await asyncio.wait({self._living, waiting}, timeout=START, return_when="FIRST_COMPLETED")
        waiting.cancel()
        if ready.is_set():
            return
        if not self._living.done():
            self._living.cancel()
            raise ToolError(f"the MCP server {self.name} does not answer")
        error = self._living.exception()
        why = _reason(error) if error else "it ended"
        raise ToolError(f"the MCP server {self.name} cannot be reached: {why}")

    async def _live(self, ready: asyncio.Event) -> None:
        """Connect and stay so: a connection must be closed by the task that opened it."""
        with open(os.devnull, "w") as unheard:  # what a command says to stderr
            async with _client(self._where, unheard) as self._client:
                ready.set()
                await self._enough.wait()

    async def _listed(self) -> list[Any]:
        """All pages of its list of tools."""
        tools: list[Any] = []
        cursor = None
        while len(tools) <= MOST_TOOLS:
            page = await self._client.list_tools(cursor=cursor)
            tools += page.tools
            cursor = page.next_cursor
            if not cursor:
                return tools
        raise ToolUnavailable(f"MCP server {self.name}: more than {MOST_TOOLS} tools")

    def _function(self, tool: Any) -> Tool:
        name = re.sub(r"[^A-Za-z0-9_-]", "_", f"{self.name}_{tool.name}")[:64]
        self._tools[name] = tool.name
        return Tool(name=name, description=tool.description or "", parameters=tool.input_schema)


def _client(where: str, unheard: TextIO) -> Any:
    try:
        from mcp import Client, StdioServerParameters, stdio_client
    except ImportError as error:
        raise ToolUnavailable(
            f"MCP servers need {error.name}: install it with `pip install 'gptoss[mcp]'`"
        ) from None
    if re.match(r"https?://", where):
        return Client(where)
    try:
        command, *words = shlex.split(where)
    except ValueError as error:
        raise ToolUnavailable(f"MCP server: {where!r} is no command: {error}") from None
    return Client(stdio_client(StdioServerParameters(command=command, args=words), unheard))


def _arguments(text: str) -> dict[str, Any]:
    try:
        said = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise ToolError(f"the arguments are no JSON: {error}") from None
    if not isinstance(said, dict):
        raise ToolError("the arguments are no JSON object")
    return said


def _text(part: Any) -> str:
    if part.type == "text":
        return str(part.text)
    if part.type == "resource" and getattr(part.resource, "text", None) is not None:
        return str(part.resource.text)
    return f"[{part.type}: not text, left out]"


def _gone(error: BaseException) -> bool:
    """Whether the connection is no more, as the library says it."""
    return type(error).__name__ in (
        "ClosedResourceError",
        "BrokenResourceError",
        "EndOfStream",
    ) or ("closed" in str(error).lower())


def _reason(error: BaseException) -> str:
    """In a sentence; of a group, its first."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return (str(error) or type(error).__name__).splitlines()[0][:300]
