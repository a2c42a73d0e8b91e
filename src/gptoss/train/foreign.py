"""Other people's conversations -> our JSON lines: ShareGPT's and OpenAI's.

ShareGPT: ``{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", ...}]}``.
OpenAI: ``{"messages": [...], "tools": [...]}`` of chat completions, with ``tool_calls`` and, as
servers of reasoning models write them, ``reasoning``, ``reasoning_content`` or ``thinking``.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gptoss.errors import TrainingError

Json = dict[str, Any]
AUTHORS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "developer",
}
THOUGHTS = ("reasoning", "reasoning_content", "thinking")


def convert(source: Path | str, target: Path | str, form: str) -> int:
    """Write ``source``, JSON lines or one list of ``form``, as our lines to ``target``; how many.

    Raises:
        ValueError: an unknown form.
        TrainingError: the first conversation that is not of this form, there is none, or ``target``
            is there already. Nothing is left behind.
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, not {form!r}")
    if os.path.lexists(target):
        raise TrainingError(f"{target}: already exists; choose another name")
    partial, count = Path(f"{target}.partial"), 0
    try:
        # Half a surrogate pair, which UTF-8 cannot express, stays what JSON calls it.
        with partial.open("w", encoding="utf-8", errors="backslashreplace") as file:
            for origin, raw in _conversations(Path(source)):
                try:
                    line = FORMS[form](raw)
                except ValueError as error:
                    raise TrainingError(f"{origin}: {error}") from None
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                count += 1
        if not count:
            raise TrainingError(f"{source}: there is no conversation in it")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return count


def _conversations(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with path.open(encoding="utf-8") as file:
            whole = file.read(1) == "["
            file.seek(0)
            if whole:
                yield from ((f"{path} item {i}", raw) for i, raw in enumerate(json.load(file), 1))
            for number, line in enumerate(() if whole else file, 1):
                if line.strip():
                    yield f"{path} line {number}", json.loads(line)
    except json.JSONDecodeError as error:
        where = "" if whole else f" line {number}"
        raise TrainingError(f"{path}{where}: not valid JSON ({error.msg}, {error.pos})") from None
    except RecursionError:
        where = "" if whole else f" line {number}"
        raise TrainingError(f"{path}{where}: JSON nested too deeply") from None
    except UnicodeDecodeError as error:
        raise TrainingError(f"{path}: not UTF-8 text ({error.reason})") from None


def from_sharegpt(raw: Mapping[str, Any]) -> Json:
    """One conversation. Raises ValueError naming what it is not."""
    turns = raw.get("conversations") if isinstance(raw, Mapping) else None
    if not isinstance(turns, list):
        raise ValueError("conversations: expected a list, as ShareGPT has it")
    messages = []
    system = raw.get("system")
    if isinstance(system, str) and system:
        messages.append({"role": "developer", "content": system})
    for i, turn in enumerate(turns):
        author = turn.get("from") if isinstance(turn, Mapping) else None
        if author not in AUTHORS:
            known = ", ".join(AUTHORS)
            raise ValueError(f"conversations[{i}].from: {author!r} is none of {known}")
        messages.append({"role": AUTHORS[author], "content": _text(turn.get("value"), i)})
    return _kept(raw) | {"messages": messages}


def from_openai(raw: Mapping[str, Any]) -> Json:
    """One conversation. Raises ValueError naming what it is not."""
    given = raw.get("messages") if isinstance(raw, Mapping) else None
    if not isinstance(given, list):
        raise ValueError("messages: expected a list, as chat completions have it")
    called: dict[str, str] = {}
    messages = [m for i, each in enumerate(given) for m in _messages(each, i, called)]
    found = _kept(raw) | {"messages": messages}
    if raw.get("tools"):
        found["tools"] = raw["tools"]
    if isinstance(effort := raw.get("reasoning_effort"), str):
        found["effort"] = effort
    return found


def _kept(raw: Mapping[str, Any]) -> Json:
    return {"id": raw["id"]} if "id" in raw else {}


def _messages(message: Any, i: int, called: dict[str, str]) -> Iterator[Json]:
    """What one message becomes: thoughts, words and calls are messages of their own."""
    if not isinstance(message, Mapping):
        raise ValueError(f"messages[{i}]: expected a JSON object")
    role, text = message.get("role"), _text(message.get("content"), i)
    match role:
        case "system" | "developer":
            yield {"role": "developer", "content": text}
        case "user":
            yield {"role": "user", "content": text}
        case "tool":
            name = called.get(str(message.get("tool_call_id"))) or message.get("name")
            if not name:
                raise ValueError(f"messages[{i}].tool_call_id: no call before has this id")
            name = name if "." in name else f"functions.{name}"
            yield {"role": "tool", "name": name, "content": text}
        case "assistant":
            yield from _assistant(message, text, i, called)
        case _:
            raise ValueError(f"messages[{i}].role: {role!r} is no role of chat completions")


def _assistant(
    message: Mapping[str, Any], text: str, i: int, called: dict[str, str]
) -> Iterator[Json]:
    thoughts = next((message[name] for name in THOUGHTS if message.get(name)), None)
    if thoughts:
        yield {"role": "assistant", "channel": "analysis", "content": _text(thoughts, i)}
    calls = message.get("tool_calls") or []
    if text or not (thoughts or calls):
        channel = "commentary" if calls else "final"
        yield {"role": "assistant", "channel": channel, "content": text}
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(f"messages[{i}].tool_calls: expected functions with a name")
        called[str(call.get("id"))] = f"functions.{function['name']}"
        yield {
            "role": "assistant",
            "channel": "commentary",
            "recipient": f"functions.{function['name']}",
            "content_type": "json",
            "content": _text(function.get("arguments"), i),
        }


def _text(content: Any, i: int) -> str:
    """Text, or the text of parts; nothing is an empty string."""
    parts = content if isinstance(content, list) else [content or ""]
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"message {i}: its content is not all text")
    return "".join(map(str, texts))


FORMS: dict[str, Callable[[Any], Json]] = {"sharegpt": from_sharegpt, "openai": from_openai}
