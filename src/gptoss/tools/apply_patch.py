"""The apply_patch tool: files of one folder, changed as the model was trained to write changes.

    *** Begin Patch
    *** Update File: src/app.py
    *** Move to: src/main.py
    @@ def greet():
     # context
    -print("Hi")
    +print("Hello")
    *** Add File: new.txt
    +first line
    *** Delete File: old.txt
    *** End Patch

A patch is read and worked out as a whole before a file is touched; then all files change, or none.
Nothing outside of the folder can be named: no absolute path, no "..", no link on the way.
Format: https://cookbook.openai.com/examples/gpt4-1_prompting_guide
"""

import asyncio
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from gptoss.errors import ToolUnavailable
from gptoss.text.messages import Tool
from gptoss.tools.call import Offer, ToolError
from gptoss.tools.files import Change, Root

MOST_PATCH = 1 << 20  # characters
BEGIN, END, TAIL = "*** Begin Patch", "*** End Patch", "*** End of File"
OPERATIONS = {"*** Add File:": "add", "*** Delete File:": "delete", "*** Update File:": "update"}
INSTRUCTIONS = f"""# apply_patch

Edit files with the function `apply_patch`. Its argument is a patch, of one or more sections:

{BEGIN}
*** Add File: path (every following line is a + line: the whole new file)
*** Delete File: path (nothing follows)
*** Update File: path (may be followed by `*** Move to: new path`, then hunks)
@@ optional line of the file above the hunk, to find its place
 context line (a space in front), three or so above and below a change
-removed line
+added line
{TAIL} (only if the hunk is at the end of the file)
{END}

Paths are relative to the folder that you work on. A patch is applied as a whole or not at all."""
FUNCTION = Tool(
    name="apply_patch",
    description="Patch a file",
    parameters={
        "type": "string",
        "description": "Formatted patch code",
        "default": f"{BEGIN}\n{END}\n",
    },
)


@dataclass(slots=True)
class Hunk:
    """Some lines and what becomes of them."""

    headers: list[str] = field(default_factory=list)  # lines of the file somewhere above it
    lines: list[str] = field(default_factory=list)  # each with its sign
    last: bool = False  # it is at the end of the file

    @property
    def before(self) -> list[str]:
        """What the file says."""
        return [line[1:] for line in self.lines if line[0] != "+"]


@dataclass(slots=True)
class Operation:
    """What becomes of one file."""

    kind: str  # add, delete, update
    path: str
    target: str | None = None  # of an update that also moves
    lines: list[str] = field(default_factory=list)  # of a new file
    hunks: list[Hunk] = field(default_factory=list)


class ApplyPatch:
    """The tool, switched on; it keeps nothing of a conversation."""

    name = "apply_patch"
    offer = Offer(functions=(FUNCTION,), instructions=INSTRUCTIONS)

    def __init__(self, folder: Path) -> None:
        self._folder, self._one_at_a_time = folder, asyncio.Lock()

    async def start(self) -> None:
        """See Kit.start."""
        if not self._folder.is_dir():
            raise ToolUnavailable(f"apply_patch: there is no folder {self._folder}")
        self._root = Root(self._folder)

    def open(self) -> "ApplyPatch":
        """See Kit.open."""
        return self

    async def call(self, recipient: str, text: str) -> str:
        """See Opened.call."""
        async with self._one_at_a_time:
            work = asyncio.ensure_future(asyncio.to_thread(apply, self._root, unwrapped(text)))
            return await asyncio.shield(work)  # never stopped halfway

    async def close(self) -> None:
        """See Opened.close."""

    async def stop(self) -> None:
        """See Kit.stop."""


def unwrapped(text: str) -> str:
    """The patch of a call: as it is, as a JSON string, or as the one member of a JSON object."""
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        return text
    inner = list(said.values()) if isinstance(said, dict) else [said]
    if len(inner) == 1 and isinstance(inner[0], str):
        return inner[0]
    raise ToolError("apply_patch takes a patch as its one argument, a text")


def apply(root: Root, text: str) -> str:
    """Change the files. Raises ToolError, and then all are as they were."""
    changes: dict[PurePosixPath, Change] = {}
    told = []
    for operation in parse(text):
        path = root.path(operation.path)
        target = path if operation.target is None else root.path(operation.target)
        for name in dict.fromkeys((path, target)):
            if name in changes:
                raise ToolError(f"{name}: the patch names it twice; say all about a file in one")
        if operation.kind == "add" or target != path:
            root.must_be_absent(target)
        if operation.kind == "add":
            changes[path] = Change("".join(f"{line}\n" for line in operation.lines))
        elif operation.kind == "delete":
            root.read(path)
            changes[path] = Change(None)
        else:
            new = updated(root.read(path), operation)
            changes |= {path: Change(None)} if target != path else {}
            changes[target] = Change(new, like=path)
        told.append(f"{operation.kind[0].upper()} {target}")
    root.commit(changes)
    return "\n".join(["Done!", *told])


def parse(text: str) -> list[Operation]:
    """The operations of a patch. Raises ToolError."""
    if len(text) > MOST_PATCH:
        raise ToolError(f"the patch is longer than {MOST_PATCH} characters")
    lines = [line.removesuffix("\r") for line in text.strip().split("\n")]
    if lines[0].strip() != BEGIN or lines[-1].strip() != END or len(lines) < 2:
        raise ToolError(f"a patch begins with the line {BEGIN!r} and ends with {END!r}")
    operations: list[Operation] = []
    for number, line in enumerate(lines[1:-1], 2):
        head = next((h for h in OPERATIONS if line.startswith(h)), None)
        if head is not None:
            operations.append(Operation(OPERATIONS[head], line.removeprefix(head).strip()))
        elif not operations or not _take(operations[-1], line):
            raise ToolError(f"line {number} of the patch cannot be there: {line[:80]!r}")
    if not operations:
        raise ToolError("the patch changes nothing")
    return operations


def _take(operation: Operation, line: str) -> bool:
    """One more line of it; whether it may have that line."""
    hunks = operation.hunks
    if operation.kind == "add":
        operation.lines.append(line[1:])
        return line.startswith("+")
    if operation.kind == "delete":
        return not line.strip()
    if line.startswith("*** Move to:") and not hunks and operation.target is None:
        operation.target = line.removeprefix("*** Move to:").strip()
    elif line.startswith("@@"):
        if not hunks or hunks[-1].lines:
            hunks.append(Hunk())
        hunks[-1].headers.append(line.removeprefix("@@").removeprefix(" "))
    elif line.rstrip() == TAIL and hunks:
        hunks[-1].last = True
    elif line == "" or line[0] in " +-":
        if not hunks or hunks[-1].last:
            hunks.append(Hunk())
        hunks[-1].lines.append(line or " ")
    else:
        return False
    return True


def updated(text: str, operation: Operation) -> str:
    """The file's text after all hunks. Raises ToolError naming the one that does not fit."""
    if not operation.hunks and operation.target is None:
        raise ToolError(f"{operation.path}: the patch says to update it, and not how")
    ended = text == "" or text.endswith("\n")  # the last line is
    lines = text.removesuffix("\n").split("\n") if text else []
    done: list[str] = []
    at = 0  # the first line that no hunk has had
    for number, hunk in enumerate(operation.hunks, 1):
        found = place(lines, hunk, at)
        while found is None and hunk.lines and hunk.lines[-1] == " ":  # a blank line between hunks
            hunk.lines.pop()
            found = place(lines, hunk, at)
        if found is None:
            wanted = "\n".join(hunk.headers + hunk.before)[:400]
            raise ToolError(
                f"{operation.path}: hunk {number} does not fit: these lines are not in the file"
                f"{' behind the hunk before' if at else ''}:\n{wanted}"
            )
        done += [*lines[at:found], *_as_in_file(lines[found:], hunk, "\r\n" in text)]
        at = found + len(hunk.before)
    done += lines[at:]
    return "\n".join(done) + ("\n" if ended and done else "")


def place(lines: Sequence[str], hunk: Hunk, start: int) -> int | None:
    """Where the hunk begins, at ``start`` or behind it; of several places the first.

    Lines are compared as they are, then without spaces at their end, then without any around them.
    """
    for header in filter(str.strip, hunk.headers):
        seen = (i for i in range(start, len(lines)) if lines[i].strip() == header.strip())
        start = next(seen, start - 1) + 1
    before = hunk.before
    if not before:
        named = any(map(str.strip, hunk.headers)) and not hunk.last
        return start if named else len(lines)
    last = len(lines) - len(before)
    for form in (_as_it_is, str.rstrip, str.strip):
        wanted, there = [form(line) for line in before], [form(line) for line in lines]
        for i in range(max(start, last) if hunk.last else start, last + 1):
            if there[i : i + len(before)] == wanted:
                return i
    return None


def _as_it_is(line: str) -> str:
    return line.removesuffix("\r")


def _as_in_file(lines: Sequence[str], hunk: Hunk, returns: bool) -> Iterator[str]:
    """The hunk's new lines, ended as the file's are; its context as the file has it."""
    at = 0
    for line in hunk.lines:
        if line[0] == "+":
            yield line[1:] + ("\r" if returns else "")
        else:
            if line[0] == " ":
                yield lines[at]
            at += 1
