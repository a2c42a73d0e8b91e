"""Tools of a response: functions are the client's own; of the others, some may be run here.

Clients offer tools that OpenAI hosts without asking whether there are any. Those are left out: the
model does not hear of them, ``tools`` of the answer does not list them, and the header
``x-gptoss-ignored`` names them; a search too, where there is no browser. Who insists on one by
``tool_choice`` is refused, and so is who asks for what nobody offers by habit: code_interpreter,
python, browser, browser_search and mcp, where the server was not started with it.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator

from gptoss.grammar import Choice, as_choice
from gptoss.server import chat
from gptoss.server.errors import refused, refusing
from gptoss.server.hosted import HostedTool, hosted
from gptoss.server.messages import Name
from gptoss.server.schema import Body
from gptoss.server.served import Served
from gptoss.text import messages

LEFT_OUT = frozenset(
    """
    apply_patch computer computer_use computer_use_preview custom file_search
    image_generation local_shell namespace programmatic_tool_calling shell tool_search
    web_search web_search_2025_08_26 web_search_preview web_search_preview_2025_03_11
    """.split()
)


class FunctionTool(chat.FunctionTool):
    """A function that the model may call."""

    type: Literal["function"]

    @property
    def echo(self) -> dict[str, Any]:
        """As the answer has it."""
        return {
            "type": "function",
            "name": self.name,
            "description": self.description,
            "parameters": self.parameters,
            "strict": bool(self.strict),
        }


class OtherTool(HostedTool):
    """A tool that the server runs, or that does not exist here."""

    @field_validator("type")
    @classmethod
    def _known(cls, value: str) -> str:
        return value if value in LEFT_OUT else super()._known(value)


class NamedFunction(Body):
    """This one must be called."""

    type: Literal["function"]
    name: Name


class AllowedTool(Body):
    """One of the tools."""

    type: Annotated[str, Field(max_length=64)]
    name: Annotated[str, Field(max_length=256)] | None = None


class AllowedTools(Body):
    """Only some of the tools: the others are as if they were not there."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[AllowedTool], Field(min_length=1, max_length=128)]


class OtherChoice(Body):
    """A tool that does not exist here must be called."""

    type: Annotated[str, Field(max_length=64)]


def _tool(value: object) -> str | None:
    if not isinstance(value, dict):
        return None
    return "function-tool" if value.get("type") == "function" else "other-tool"


def _choice(value: object) -> str:
    if not isinstance(value, dict):
        return "a-word"
    named = {"function": "a-function", "allowed_tools": "some-tools"}
    kind = value.get("type")
    return named.get(kind, "other-choice") if isinstance(kind, str) else "other-choice"


AnyTool = Annotated[
    Annotated[FunctionTool, Tag("function-tool")] | Annotated[OtherTool, Tag("other-tool")],
    Discriminator(_tool, custom_error_type="tool", custom_error_message="a tool is an object"),
]
AnyChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("a-word")]
    | Annotated[NamedFunction, Tag("a-function")]
    | Annotated[AllowedTools, Tag("some-tools")]
    | Annotated[OtherChoice, Tag("other-choice")],
    Discriminator(_choice),
]


def functions(tools: Sequence[FunctionTool | OtherTool]) -> list[FunctionTool]:
    """Those that the model may call. Raises ApiError if two have one name."""
    found = [tool for tool in tools if isinstance(tool, FunctionTool)]
    names = [tool.name for tool in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise refused(f"tools: two have the name {twice[0]!r}", "tools")
    return found


def run_here(
    tools: Sequence[FunctionTool | OtherTool], said: str | Body | None, served: Served
) -> list[str]:
    """The server's own tools that are asked for. Raises ApiError."""
    asked = [tool for tool in tools if _runs(tool, served)]
    if isinstance(said, AllowedTools):
        asked = [tool for tool in asked if any(_is(tool, allowed) for allowed in said.tools)]
    return hosted([tool for tool in asked if isinstance(tool, OtherTool)], served)


def _is(tool: FunctionTool | OtherTool, allowed: AllowedTool) -> bool:
    """Whether it is the one; without a label, all MCP servers are."""
    label = tool.server_label if isinstance(tool, OtherTool) else None
    wanted = (allowed.model_extra or {}).get("server_label")
    return tool.type == allowed.type and wanted in (None, label)


def left_out(tools: Sequence[FunctionTool | OtherTool], served: Served) -> list[str]:
    """Kinds of tools that the model does not hear of."""
    others = (tool for tool in tools if isinstance(tool, OtherTool))
    return sorted({tool.type for tool in others if not _runs(tool, served)})


def echoed(tools: Sequence[FunctionTool | OtherTool], served: Served) -> list[dict[str, Any]]:
    """As the answer has them."""
    return [tool.echo for tool in tools if isinstance(tool, FunctionTool) or _runs(tool, served)]


def _runs(tool: FunctionTool | OtherTool, served: Served) -> bool:
    """Whether it is for the server. apply_patch of that type would be the client's: see docs."""
    if isinstance(tool, FunctionTool) or tool.type == "apply_patch":
        return False
    there = served.tools is not None and tool.tool in served.tools.kits
    return there or tool.type not in LEFT_OUT


def offered(
    tools: Sequence[FunctionTool], said: str | Body | None
) -> tuple[list[messages.Tool], Choice]:
    """What the model is told of, and what it must call. Raises ApiError."""
    told = [
        messages.Tool(
            name=tool.name,
            description=tool.description or "",
            parameters=tool.parameters,
            strict=bool(tool.strict),
        )
        for tool in tools
    ]
    choice: str | Mapping[str, Any] | None
    match said:
        case NamedFunction():
            choice = said.model_dump()
        case AllowedTools():
            choice = said.mode
            told = _allowed(told, said)
        case OtherChoice():
            what = f"tool_choice: {said.type!r} cannot be called here by name; functions can"
            raise refused(what, "tool_choice")
        case str() | None:
            choice = said
        case _:
            raise AssertionError(said)
    with refusing("tool_choice"):
        return told, as_choice(choice, told)


def _allowed(tools: list[messages.Tool], said: AllowedTools) -> list[messages.Tool]:
    chosen = {tool.name for tool in said.tools if tool.type == "function"}
    if absent := sorted(str(n) for n in chosen.difference(tool.name for tool in tools)):
        raise refused(f"tool_choice: there is no tool {absent[0]!r}", "tool_choice")
    return [tool for tool in tools if tool.name in chosen]
