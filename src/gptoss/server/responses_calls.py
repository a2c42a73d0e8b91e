"""Calls that are run here, as items: code_interpreter_call, web_search_call and mcp_call.

As clients know them, and with what the model was shown: ``outputs`` of code, ``output`` of the
others. So kept, they are what a later turn needs. apply_patch is an mcp_call of that label.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from gptoss.server.responses_items import new_id
from gptoss.tools import Result

Said = dict[str, Any]
OPENED = re.compile(
    r"\[\d+\] [^\n]*\(([^()\n]+)\)\n"
)  # the address of a page, as the browser says it


@dataclass(slots=True)
class Hosted:
    """A call that is being said, or run. Events come as those of ``responses_output``."""

    owner: str
    recipient: str
    index: int  # which message of the turn it is
    at: int  # and which item of the output
    container: str
    id: str = ""
    text: list[str] = field(default_factory=list)
    status: str = "in_progress"
    result: Result | None = None
    _begun: bool = False

    def __post_init__(self) -> None:
        prefix = {"python": "ci", "browser": "ws"}.get(self.owner, "mcp")
        self.id = new_id(prefix)

    @property
    def kind(self) -> str:
        """Its type, without "_call"."""
        return {"python": "code_interpreter", "browser": "web_search"}.get(self.owner, "mcp")

    @property
    def item(self) -> Said:
        """All of it, up to now."""
        text, output = "".join(self.text), self.result.text if self.result else None
        head = {"type": f"{self.kind}_call", "id": self.id, "status": self.status}
        name = self.recipient.removeprefix("functions.")
        if self.kind == "code_interpreter":
            logs = None if output is None else [{"type": "logs", "logs": output}]
            return {**head, "code": text, "container_id": self.container, "outputs": logs}
        if self.kind == "web_search":
            more = {"name": name, "arguments": text, "output": output}
            return {**head, "action": action(name, text, output or ""), **more}
        failed = self.result is not None and self.result.failed
        return {
            **head,
            "server_label": self.owner,
            "name": name,
            "arguments": text,
            "output": output,
            "error": {"type": "mcp_tool_execution_error", "content": output} if failed else None,
            "approval_request_id": None,
        }

    def grow(self, text: str) -> Iterator[Said]:
        """The model says more of it. A search is told when it is whole, as all clients know it."""
        self.text.append(text)
        if self.kind == "web_search":
            return
        yield from self._begin()
        stem = "code_interpreter_call_code" if self.kind != "mcp" else "mcp_call_arguments"
        yield self._of(f"{stem}.delta", delta=text)

    def complete(self) -> Iterator[Said]:
        """The model has said it; now it runs."""
        yield from self._begin()
        text = "".join(self.text)
        if self.kind == "code_interpreter":
            yield self._of("code_interpreter_call_code.done", code=text)
            yield self._of("code_interpreter_call.interpreting")
        elif self.kind == "mcp":
            yield self._of("mcp_call_arguments.done", arguments=text)
        else:
            yield self._of("web_search_call.searching")

    def end(self, result: Result | None = None) -> Iterator[Said]:
        """It is over; without a result, it was cut before it came to one."""
        yield from self._begin()
        self.result = result
        failed = result is not None and result.failed
        self.status = "incomplete" if result is None else "failed" if failed else "completed"
        if result is not None:
            ending = "failed" if failed and self.kind == "mcp" else "completed"
            yield self._of(f"{self.kind}_call.{ending}")
        yield {"type": "response.output_item.done", "output_index": self.at, "item": self.item}

    def _begin(self) -> Iterator[Said]:
        """It is there, unless that was told."""
        if not self._begun:
            self._begun = True
            yield {
                "type": "response.output_item.added",
                "output_index": self.at,
                "item": self.item,
            }
            yield self._of(f"{self.kind}_call.in_progress")

    def _of(self, name: str, **more: Any) -> Said:
        return {
            "type": f"response.{name}",
            "item_id": self.id,
            "output_index": self.at,
            **more,
        }


def action(name: str, arguments: str, output: str) -> Said:
    """What a call of the browser does, in the API's words."""
    try:
        said = json.loads(arguments)
    except (ValueError, RecursionError):
        said = None
    given = said if isinstance(said, dict) else {}
    page = OPENED.match(output)
    url = page[1] if page else None
    if name == "browser.open":
        wanted = given.get("id")
        return {"type": "open_page", "url": url or (wanted if isinstance(wanted, str) else None)}
    if name == "browser.find":
        return {"type": "find_in_page", "pattern": str(given.get("pattern")), "url": url or ""}
    query = str(given.get("query"))
    return {"type": "search", "query": query, "queries": [query]}
