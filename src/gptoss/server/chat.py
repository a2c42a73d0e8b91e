"""``/v1/chat/completions``: what a client asks, and the two ways in which it is answered."""

from collections.abc import AsyncGenerator, Mapping
from dataclasses import asdict
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import Discriminator, Field, Tag, field_validator
from starlette.responses import Response

from gptoss.grammar import as_choice, as_format
from gptoss.server.errors import refused, refusing
from gptoss.server.gate import tell
from gptoss.server.hosted import HostedTool, hosted
from gptoss.server.loop import Loop, answer
from gptoss.server.messages import MOST_MESSAGES, AnyMessage, Name, as_conversation, depth
from gptoss.server.schema import EITHER, Body, Drawn, StreamOptions, check_model
from gptoss.server.served import Served
from gptoss.server.speech import Speech, usage
from gptoss.server.sse import DONE, EventStream, Whole, event
from gptoss.server.turn import Ask, Turn
from gptoss.text.messages import Tool

DEEPEST = 64  # levels of a tool's parameters


class FunctionTool(Body):
    """A function that the model may call."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @field_validator("parameters")
    @classmethod
    def _shallow(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if not depth(value, DEEPEST):
            raise ValueError(f"nested more than {DEEPEST} levels deep")
        return value


class ToolBody(Body):
    """A function, run by the client."""

    type: Literal["function"]
    function: FunctionTool


def _tool(value: object) -> str | None:
    if not isinstance(value, dict):
        return None
    return "function-tool" if value.get("type") in ("function", None) else "hosted-tool"


AnyTool = Annotated[
    Annotated[ToolBody, Tag("function-tool")] | Annotated[HostedTool, Tag("hosted-tool")],
    Discriminator(_tool, custom_error_type="tool", custom_error_message="a tool is an object"),
]


class NamedFunction(Body):
    """A function by its name."""

    name: Name


class NamedTool(Body):
    """This one must be called; among allowed tools, this is one."""

    type: Literal["function"]
    function: NamedFunction


class Allowed(Body):
    """Some of the tools."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=128)]


class AllowedTools(Body):
    """Only some of the tools: the others are as if they were not there."""

    type: Literal["allowed_tools"]
    allowed_tools: Allowed


class FormatBody(Body):
    """The form of the final answer. Of ``json_schema``, ``schema`` counts and is always held to."""

    type: Literal["text", "json_object", "json_schema", "regex", "grammar"]
    json_schema: dict[str, Any] | None = None


class ChatRequest(Drawn):
    """A conversation to go on with."""

    messages: Annotated[list[AnyMessage], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_tokens: Annotated[int, Field(ge=1, le=1 << 31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=1 << 31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    reasoning_effort: Literal["low", "medium", "high"] | None = None
    tools: Annotated[list[AnyTool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedTools | None = None
    parallel_tool_calls: bool | None = None  # the model makes one call a turn in any case
    response_format: FormatBody | None = None
    stream_options: StreamOptions | None = None
    modalities: list[Literal["text"]] | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with what it cost."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def ask(self, served: Served) -> Ask:
        """The turn that is wanted. Raises ApiError, or ValueError."""
        if self.top_logprobs is not None and not self.logprobs:
            raise refused("top_logprobs needs logprobs: true", "top_logprobs")
        tools, said = self._functions()
        ours = hosted([tool for tool in self.tools or [] if isinstance(tool, HostedTool)], served)
        if ours and (self.n or 1) > 1:
            raise refused("n: with tools that the server runs there is one answer", "n")
        with refusing("tool_choice"):
            choice = as_choice(said, tools)
        form = self.response_format
        with refusing("response_format"):
            format = as_format(form.model_dump(exclude_none=True) if form else None)
        named = ((form and form.json_schema) or {}).get("name", "answer")
        messages = as_conversation(
            self.messages,
            effort=self.reasoning_effort or "medium",
            tools=tools,
            format=None if format is None else (str(named), format),
            thoughts=served.thoughts,
        )
        limits = [x for x in (self.max_tokens, self.max_completion_tokens) if x is not None]
        settings = self.settings(
            max_tokens=min(limits, default=None),
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )
        if ours and served.tools is not None:
            messages = served.tools.offered(messages, ours)
        return Ask(messages=messages, settings=settings, format=format, choice=choice, tools=ours)

    def _functions(self) -> tuple[list[Tool], str | Mapping[str, Any] | None]:
        """The tools that there are for this turn, and which of them to call."""
        tools = [
            Tool(
                name=tool.function.name,
                description=tool.function.description or "",
                parameters=tool.function.parameters,
                strict=bool(tool.function.strict),
            )
            for tool in self.tools or []
            if isinstance(tool, ToolBody)
        ]
        names = [tool.name for tool in tools]
        if twice := [name for name in names if names.count(name) > 1]:
            raise refused(f"tools: two have the name {twice[0]!r}", "tools")
        match self.tool_choice:
            case NamedTool() as named:
                return tools, named.model_dump()
            case AllowedTools(allowed_tools=allowed):
                chosen = {tool.function.name for tool in allowed.tools}
                if absent := sorted(chosen.difference(names)):
                    raise refused(f"tool_choice: there is no tool {absent[0]!r}", "tool_choice")
                return [tool for tool in tools if tool.name in chosen], allowed.mode
            case choice:
                return tools, choice


router = APIRouter()


@router.post("/v1/chat/completions", responses=EITHER, response_class=Response)
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """The next turn of a conversation."""
    served: Served = request.app.state.served
    check_model(body.model, served)
    tell(request, ignored=body.unknown())
    with refusing():
        ask = body.ask(served)
    turn = await answer(served, ask)
    speech = Speech(served, ask.settings.n, logprobs=bool(body.logprobs))
    if body.stream:
        return EventStream(_stream(body, request, turn, speech), turn.cancel)
    return Whole(lambda: _whole(request, turn, speech), turn.cancel)


async def _whole(request: Request, turn: Turn | Loop, speech: Speech) -> dict[str, Any]:
    async with turn:
        async for said in turn:
            speech.take(said)
    tell(request, usage=asdict(turn.usage), finish=speech.reasons)
    return speech.whole(turn.usage)


async def _stream(
    body: ChatRequest, request: Request, turn: Turn | Loop, speech: Speech
) -> AsyncGenerator[bytes, None]:
    more = {"usage": None} if body.include_usage else {}
    async with turn:
        for row in range(speech.n):
            first = {"role": "assistant", "content": ""}
            yield event(speech.chunk(row, first) | more)
        async for said in turn:
            for chunk in speech.chunks(said):
                yield event(chunk | more)
    tell(request, usage=asdict(turn.usage), finish=speech.reasons)
    if body.include_usage:
        yield event(speech.frame("chat.completion.chunk", [], usage=usage(turn.usage)))
    yield DONE
