"""Tools that this server runs, as clients ask for them: {"type": "python"} and the like.

Only what the server was started with can be asked for. Names of OpenAI's and Groq's for the same
things are understood: code_interpreter is python, web_search and browser_search are the browser.
"""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, field_validator

from gptoss.server.errors import refused
from gptoss.server.schema import Body
from gptoss.server.served import Served

NAMES = {
    "python": "python",
    "code_interpreter": "python",
    "browser": "browser",
    "browser_search": "browser",
    "web_search": "browser",
    "web_search_2025_08_26": "browser",
    "web_search_preview": "browser",
    "web_search_preview_2025_03_11": "browser",
    "apply_patch": "apply_patch",
}


class HostedTool(Body):
    """A tool that the server runs; ``server_label`` says which, if the type is mcp."""

    type: Annotated[str, Field(max_length=64)]
    server_label: Annotated[str, Field(max_length=64)] | None = None
    server_url: Annotated[str, Field(max_length=4096)] | None = None

    @field_validator("type")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in NAMES and value != "mcp":
            raise ValueError(f"{value[:40]!r} is no kind of tool; function is")
        return value

    @property
    def tool(self) -> str | None:
        """What the server calls it; None: it is not said."""
        return self.server_label if self.type == "mcp" else NAMES.get(self.type)

    @property
    def echo(self) -> dict[str, Any]:
        """As the answer has it."""
        extra = {"container": {"type": "auto"}} if self.type == "code_interpreter" else {}
        return extra | self.model_dump(exclude_none=True)


def hosted(tools: Sequence[HostedTool], served: Served) -> list[str]:
    """The server's tools that are asked for, each once. Raises ApiError."""
    there = served.tools.kits if served.tools is not None else {}
    names: list[str] = []
    for tool in tools:
        if tool.type == "mcp" and tool.server_url is not None:
            raise refused(
                "tools: server_url is not followed; this server calls only the MCP servers it was "
                "started with (--mcp), by their server_label",
                "tools",
            )
        if tool.tool is None:
            raise refused("tools: mcp needs a server_label", "tools")
        if tool.tool not in there:
            raise refused(
                f"tools: {tool.tool!r} is not switched on at this server ({_flag(tool)}); "
                f"it runs {_listed(there)}",
                "tools",
            )
        if (unmet := _unmet(tool)) is not None:
            raise refused(f"tools: {unmet}", "tools")
        names.append(tool.tool)
    return list(dict.fromkeys(names))


def _unmet(tool: HostedTool) -> str | None:
    """What is asked of it beyond what there is; what could not change anything is ignored."""
    asked = tool.model_extra or {}
    if asked.get("require_approval") not in (None, "never"):
        return "require_approval: calls are run as they come; say never, or leave the tool out"
    if asked.get("allowed_tools") is not None:
        return "allowed_tools: all tools of an MCP server are offered, or none"
    container = asked.get("container") or {"type": "auto"}
    if not isinstance(container, dict) or container.get("file_ids"):
        return "container: there is a new one for each request, {'type': 'auto'}, without files"
    return None


def _listed(names: Any) -> str:
    return ", ".join(names) or "none"


def _flag(tool: HostedTool) -> str:
    if tool.type == "mcp" and tool.tool != "apply_patch":
        return "gptoss serve --mcp NAME=COMMAND"
    return f"gptoss serve --tool {tool.tool}"
