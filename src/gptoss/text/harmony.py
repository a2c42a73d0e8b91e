"""A conversation -> the tokens gpt-oss reads: the harmony format.

    <|start|>author[ to=recipient][<|channel|>channel][ content type]<|message|>content<|end|>

Equal, token for token, to OpenAI's own renderer (openai-harmony 0.0.8), its oddities included. One
difference: text that goes into a header must be a plain word, so that no name can forge a turn.
Format: https://cookbook.openai.com/articles/openai-harmony
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, get_args

from gptoss.text.messages import Developer, Effort, Message, Role, System, Tool
from gptoss.text.tokenizer import Tokenizer
from gptoss.text.tools import PATH, WORD, builtin, namespace, plain

_CONSTRAIN = "<|constrain|>"  # json is always constrained; other types where they say so
_KIND = re.compile(rf"({re.escape(_CONSTRAIN)})?{WORD.pattern}")


def render(
    messages: Sequence[Message], tokenizer: Tokenizer, *, keep_analysis: bool = False
) -> list[int]:
    """The conversation so far, every message closed.

    When the assistant's last message is final, analysis before the first final message is left out
    (the model was trained so), unless ``keep_analysis``. Raises ValueError naming the field that
    cannot be rendered, and TokenizerError if the vocabulary lacks a formatting token.
    """
    functions = any(isinstance(m.content, Developer) and m.content.tools for m in messages)
    spent = 0 if keep_analysis else _spent(messages)
    return [
        token
        for i, message in enumerate(messages)
        if i >= spent or message.channel != "analysis"
        for token in _message(message, tokenizer, functions)
    ]


def render_for_completion(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    role: Role = "assistant",
    *,
    keep_analysis: bool = False,
) -> list[int]:
    """``render``, then the opening of the turn that the model shall write."""
    if role not in get_args(Role):
        raise ValueError(f"role: {role!r} is none of {', '.join(get_args(Role))}")
    tokens = render(messages, tokenizer, keep_analysis=keep_analysis)
    return [*tokens, tokenizer.special("<|start|>"), *tokenizer.encode(role)]


def render_for_training(
    messages: Sequence[Message], tokenizer: Tokenizer, *, keep_analysis: bool = False
) -> list[int]:
    """``render``, but a final answer at the end closes with <|return|>, as the model samples it."""
    tokens = render(messages, tokenizer, keep_analysis=keep_analysis)
    if messages and messages[-1].role == "assistant" and messages[-1].channel == "final":
        tokens[-1] = tokenizer.special("<|return|>")
    return tokens


def without_old_thoughts(messages: Sequence[Message]) -> list[Message]:
    """The conversation without the analysis that led to its final answers.

    The format's documentation asks for this; OpenAI's renderer, and so ``render``, forgets only the
    first answer's. What was thought since the last answer stays: a tool loop needs it.
    """
    finals = (i for i, m in enumerate(messages) if m.role == "assistant" and m.channel == "final")
    last = max(finals, default=0)
    return [m for i, m in enumerate(messages) if i >= last or m.channel != "analysis"]


def _spent(messages: Sequence[Message]) -> int:
    """Analysis before this index is no longer needed."""
    spoken = [m for m in messages if m.role == "assistant"]
    if not spoken or spoken[-1].channel != "final":
        return 0  # inside a tool loop: the model still needs its thoughts
    return next(i for i, m in enumerate(messages) if m.channel == "final")


def _message(message: Message, tokenizer: Tokenizer, functions: bool) -> Iterator[int]:
    role, recipient = message.role, message.recipient
    if role not in get_args(Role):
        raise ValueError(f"role: {role!r} is none of {', '.join(get_args(Role))}")
    text = _content(message, functions)

    yield tokenizer.special("<|start|>")
    if role == "tool":
        if message.name is None:
            raise ValueError("name: a tool's message must name the tool")
        yield from tokenizer.encode(plain("name", message.name, PATH))
    else:
        yield from tokenizer.encode(role)
        if message.name is not None:
            yield from tokenizer.encode(":" + plain("name", message.name, PATH))
    if recipient == "all":
        recipient = None
    if recipient is not None:
        yield from tokenizer.encode(" to=" + plain("recipient", recipient, PATH))
    if message.channel is not None:
        yield tokenizer.special("<|channel|>")
        yield from tokenizer.encode(plain("channel", message.channel, WORD))
    if message.content_type is not None:
        kind = plain("content_type", message.content_type, _KIND)
        if kind == "json" or kind.startswith(_CONSTRAIN):
            yield from tokenizer.encode(" ")
            yield tokenizer.special(_CONSTRAIN)
            yield from tokenizer.encode(kind.removeprefix(_CONSTRAIN))
        else:
            yield from tokenizer.encode(" " + kind)
    yield tokenizer.special("<|message|>")
    yield from tokenizer.encode(text)
    call = role == "assistant" and recipient is not None
    yield tokenizer.special("<|call|>" if call else "<|end|>")


def _content(message: Message, functions: bool) -> str:
    match message.content:
        case str(text):
            return text
        case System() as system if message.role == "system":
            return _system(system, functions)
        case Developer() as developer if message.role == "developer":
            return _developer(developer)
        case other:
            raise ValueError(
                f"content: {type(other).__name__} does not fit a message of role {message.role}"
            )


def _system(system: System, functions: bool) -> str:
    if system.effort not in get_args(Effort):
        raise ValueError(f"effort: {system.effort!r} is none of {', '.join(get_args(Effort))}")
    head = [] if system.identity is None else [system.identity]
    if system.knowledge_cutoff is not None:
        head.append(f"Knowledge cutoff: {system.knowledge_cutoff}")
    if system.current_date is not None:
        head.append(f"Current date: {system.current_date}")
    sections = ["\n".join(head)] if head else []
    sections.append(f"Reasoning: {system.effort}")
    if system.builtin_tools:
        sections.append("# Tools")
        sections += [builtin(name) for name in sorted(set(system.builtin_tools))]
    if system.channels:
        line = f"# Valid channels: {', '.join(system.channels)}."
        line += " Channel must be included for every message."
        if functions:
            line += "\nCalls to these tools must go to the commentary channel: 'functions'."
        sections.append(line)
    return "\n\n".join(sections)


def _developer(developer: Developer) -> str:
    sections = []
    if developer.instructions is not None:
        sections += ["# Instructions", developer.instructions]
    if developer.tools:
        sections += ["# Tools", namespace("functions", "", developer.tools)]
    return "\n\n".join(sections)


# --- conversations as users write them


def as_message(message: Message | Mapping[str, Any]) -> Message:
    """A Message as it is, or one made of a dict with the same keys; ValueError names a bad one.

    A dict speaks the chat-completions dialect where that is looser: text of role system or
    developer is the developer's instructions, an assistant's message is final (commentary, if it
    has a recipient), and a tool answers the assistant on commentary.
    """
    if isinstance(message, Message):
        return message
    if not isinstance(message, Mapping):
        raise ValueError(f"a message is {type(message).__name__}, expected a dict or a Message")
    known = [field.name for field in fields(Message)]
    if unknown := [key for key in message if key not in known]:
        raise ValueError(f"message key {unknown[0]!r} is none of {', '.join(known)}")
    given = {key: value for key, value in message.items() if value is not None}
    role, content = given.get("role"), given.get("content")
    if role not in get_args(Role):
        raise ValueError(f"role: {role!r} is none of {', '.join(get_args(Role))}")
    if not isinstance(content, str | System | Developer):
        raise ValueError(f"content: {type(content).__name__} where text was expected")
    for key in ("name", "channel", "recipient", "content_type"):
        if not isinstance(given.get(key, ""), str):
            raise ValueError(f"{key}: {type(given[key]).__name__} where text was expected")
    if role in ("system", "developer") and isinstance(content, str):
        given |= {"role": "developer", "content": Developer(instructions=content)}
    elif role == "assistant":
        given.setdefault("channel", "commentary" if "recipient" in given else "final")
    elif role == "tool":
        given = {"channel": "commentary", "recipient": "assistant"} | given
    return Message(**given)


def as_tool(tool: Tool | Mapping[str, Any]) -> Tool:
    """A Tool as it is, or one made of ``{"name", "description", "parameters", "strict"}``.

    Also as chat completions wrap it: ``{"type": "function", "function": {...}}``.
    """
    if isinstance(tool, Tool):
        return tool
    inner = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise ValueError("tool: expected a Tool, or a dict with name, description and parameters")
    parameters = inner.get("parameters")
    if not isinstance(parameters, Mapping | None):
        raise ValueError(f"parameters of {inner['name']}: {type(parameters).__name__}, not a dict")
    return Tool(
        name=inner["name"],
        description=inner.get("description") or "",
        parameters=parameters,
        strict=inner.get("strict") is True,
    )


def with_defaults(
    messages: Sequence[Message | Mapping[str, Any]],
    *,
    effort: Effort = "medium",
    instructions: str | None = None,
    tools: Sequence[Tool | Mapping[str, Any]] = (),
    current_date: str | None = None,
) -> list[Message]:
    """The conversation with the system and developer messages it needs in front.

    A ``System`` that is there already stays, and ``effort`` and ``current_date`` with it; system
    messages that are mere text (a model wrote them) stay where they are.
    ``instructions`` and ``tools`` complete the first developer message, or make one; ValueError if
    it has its own.
    """
    turns = [as_message(message) for message in messages]
    system = next((m for m in turns if isinstance(m.content, System)), None)
    developer = next((m for m in turns if isinstance(m.content, Developer)), None)
    content = developer.content if developer is not None else Developer()
    assert isinstance(content, Developer)
    if instructions is not None:
        if content.instructions is not None:
            raise ValueError("instructions: the messages already bring their own")
        content = replace(content, instructions=instructions)
    if tools:
        if content.tools:
            raise ValueError("tools: the messages already bring their own")
        content = replace(content, tools=tuple(map(as_tool, tools)))
    front = [
        system or Message(role="system", content=System(effort=effort, current_date=current_date))
    ]
    if content != Developer():
        front.append(Message(role="developer", content=content))
    return front + [m for m in turns if m is not system and m is not developer]
