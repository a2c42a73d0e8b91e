"""Items of a conversation: as they are kept, and as the model reads them.

A kept item is plain JSON in the API's own form, with an id; history comes back from the store in
it. What the model thought is an item of its own, and goes back to where it was. Before a call
whose thoughts a client dropped, they are put back from memory.
"""

import base64
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from gptoss.server.errors import refused
from gptoss.server.served import Thoughts
from gptoss.text.messages import Developer, Message

HOSTED = ("code_interpreter_call", "web_search_call", "mcp_call")  # what a server has run
SEAL = "gptoss1."  # before thoughts that travel with a client: they are encoded, not encrypted


def new_id(prefix: str) -> str:
    """As OpenAI's look; cannot be guessed."""
    return f"{prefix}_{secrets.token_hex(24)}"


def message(role: str, text: str) -> dict[str, Any]:
    """What anybody but the assistant said, as an item."""
    return {
        "type": "message",
        "id": new_id("msg"),
        "role": role,
        "status": "completed",
        "content": [{"type": "input_text", "text": text}],
    }


def output_text(text: str, logprobs: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """The model's text, as a part."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs or []}


def reasoning(id: str, text: str, status: str, *, seal: bool = False) -> dict[str, Any]:
    """Thoughts, as an item; ``seal``: also in the form that clients carry without reading it."""
    return {
        "type": "reasoning",
        "id": id,
        "summary": [],
        "content": [{"type": "reasoning_text", "text": text}] if text else [],
        "encrypted_content": SEAL + base64.b64encode(text.encode()).decode() if seal else None,
        "status": status,
    }


def function_call(id: str, call: str, name: str, arguments: str, status: str) -> dict[str, Any]:
    """A call, as an item."""
    return {
        "type": "function_call",
        "id": id,
        "call_id": call,
        "name": name,
        "arguments": arguments,
        "status": status,
    }


def unsealed(said: str) -> str:
    """Thoughts that a client carried; nothing, if another server sealed them."""
    if not said.startswith(SEAL):
        return ""
    try:
        return base64.b64decode(said.removeprefix(SEAL), validate=True).decode()
    except ValueError:
        return ""


def leading(items: Iterable[Mapping[str, Any]]) -> list[str]:
    """The texts of system and developer before anybody else speaks."""
    told: list[str] = []
    for item in items:
        if item.get("role") not in ("system", "developer"):
            break
        told.append(item["content"][0]["text"])
    return told


class Reader:
    """Kept items -> messages for the model."""

    def __init__(self, thoughts: Thoughts) -> None:
        self.messages: list[Message] = []
        self._thoughts = thoughts
        self._called: dict[str, str] = {}  # call id -> recipient
        self._turn = 0  # where the assistant began to speak
        self._unnamed: list[int] = []  # what it said since, and on which channel is not known

    def read(self, item: Mapping[str, Any]) -> None:
        """The next item. Raises ApiError: the result of a call that is not there."""
        match item["type"]:
            case "reasoning":
                if item["content"]:
                    self._say("analysis", item["content"][0]["text"])
            case "function_call":
                self._call(item)
            case "function_call_output":
                self._other(self._result(item))
            case kind if kind in HOSTED:
                self.messages += hosted_messages(item)
            case _ if item["role"] == "assistant":
                if item.get("phase") is None:
                    self._unnamed.append(len(self.messages))
                channel = "commentary" if item.get("phase") == "commentary" else "final"
                self._say(channel, item["content"][0]["text"])
            case _:
                self._other(_foreign(item["role"], item["content"][0]["text"]))

    def _say(self, channel: str, text: str) -> None:
        self.messages.append(Message(role="assistant", channel=channel, content=text))

    def _call(self, item: Mapping[str, Any]) -> None:
        name = item["name"]
        for i in self._unnamed:  # text beside a call is no final answer
            self.messages[i] = replace(self.messages[i], channel="commentary")
        self._unnamed.clear()
        since = self.messages[self._turn :]
        if not any(m.channel == "analysis" or m.role == "tool" for m in since):
            self.messages[self._turn : self._turn] = self._thoughts.before(item["call_id"])
        self._called[item["call_id"]] = name if "." in name else f"functions.{name}"
        self.messages.append(
            Message(
                role="assistant",
                channel="commentary",
                recipient=self._called[item["call_id"]],
                content_type="json",
                content=item["arguments"],
            )
        )

    def _result(self, item: Mapping[str, Any]) -> Message:
        if item["call_id"] not in self._called:
            said = item["call_id"][:80]
            raise refused(f"input: no call before its output has the call_id {said!r}", "input")
        return Message(
            role="tool",
            name=self._called[item["call_id"]],
            channel="commentary",
            recipient="assistant",
            content=item["output"],
        )

    def _other(self, message: Message) -> None:
        self.messages.append(message)
        self._turn = len(self.messages)
        self._unnamed.clear()


def _foreign(role: str, text: str) -> Message:
    if role == "user":
        return Message(role="user", content=text)
    return Message(role="developer", content=Developer(instructions=text))


def hosted_messages(item: Mapping[str, Any]) -> list[Message]:
    """A kept item as the model reads it: the call and its result; nothing, if it has none."""
    if item["type"] == "code_interpreter_call":
        logs = [o["logs"] for o in item.get("outputs") or [] if o.get("type") == "logs"]
        recipient, text, output = "python", item.get("code"), "\n".join(logs) if logs else None
    else:
        name = str(item.get("name"))
        recipient = name if item["type"] == "web_search_call" else f"functions.{name}"
        text, output = item.get("arguments"), item.get("output")
    if text is None or output is None or recipient == "None":
        return []
    function = recipient.startswith("functions.")
    channel = "commentary" if function else "analysis"
    kind = "json" if function else "code"
    call = Message(
        role="assistant", channel=channel, recipient=recipient, content_type=kind, content=text
    )
    back = Message(
        role="tool", name=recipient, channel=channel, recipient="assistant", content=output
    )
    return [call, back]
