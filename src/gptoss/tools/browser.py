"""The browser tool, as the model was trained to use it: search, open, find.

Every answer is a page with numbered lines, at most ``VIEW`` characters at once:

    [cursor] title (address)
    **viewing lines [0 - 9] of 41**

    L0: text 【3†a link】

Pages of a conversation stay open under their cursors. What is searched is a ``Backend``'s business.
"""

import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os.path import commonprefix
from typing import Any, Protocol

from gptoss.tools.call import Offer, ToolError

WIDTH, VIEW = 80, 4000  # characters of a line, and of a view: about 1,000 tokens
MOST_HITS, MOST_FINDS, FIND_LINES = 20, 50, 4
ABOVE = 4  # lines above the passage for which a page is opened
MOST_PAGES = 200  # of a conversation
LINK = re.compile(r"【\d+†([^【】†]*)(?:†[^【】]*)?】")


@dataclass(frozen=True, slots=True)
class Hit:
    """What a search found."""

    address: str
    title: str
    excerpt: str


@dataclass(frozen=True, slots=True)
class Document:
    """What an address holds. Links are written 【number†text】; ``links`` has their addresses."""

    address: str
    title: str
    text: str
    links: Mapping[int, str] = field(default_factory=dict)


class Backend(Protocol):
    """What can be browsed. Its text is shown to the model, and no more than that is done with it.

    One that follows addresses into a network must refuse private ones after every resolution.
    """

    async def start(self) -> None:
        """Raises ToolUnavailable."""
        ...

    async def search(self, query: str, count: int) -> Sequence[Hit]:
        """The best first. Raises ToolError."""
        ...

    async def fetch(self, address: str) -> Document:
        """Raises ToolError."""
        ...


@dataclass(frozen=True, slots=True)
class Page:
    """What is open under a cursor."""

    address: str
    title: str
    lines: Sequence[str]
    links: Mapping[int, tuple[str, str]]  # address, and words to look for when it is opened


class Browser:
    """The tool, switched on."""

    name, offer = "browser", Offer(builtin="browser")

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    async def start(self) -> None:
        """See Kit.start."""
        await self.backend.start()

    def open(self) -> "Tab":
        """See Kit.open."""
        return Tab(self.backend)

    async def stop(self) -> None:
        """See Kit.stop."""


class Tab:
    """One conversation's."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._pages: list[Page] = []

    async def call(self, recipient: str, text: str) -> str:
        """See Opened.call."""
        given = _arguments(text)
        if len(self._pages) >= MOST_PAGES:
            raise ToolError("too many pages are open; answer with what you have seen")
        match recipient.removeprefix("browser."):
            case "search":
                return await self._search(_text(given, "query"), _number(given, "topn", 10))
            case "open":
                return await self._open(given)
            case "find":
                return self._find(_text(given, "pattern"), _number(given, "cursor", -1))
        raise ToolError(f"{recipient[:80]} does not exist; browser.search, .open and .find do")

    async def close(self) -> None:
        """See Opened.close."""

    async def _search(self, query: str, count: int) -> str:
        hits = await self._backend.search(query, max(1, min(count, MOST_HITS)))
        if not hits:
            raise ToolError(f"nothing was found for {query[:200]!r}; try other words")
        found = [f"  * 【{i}†{h.title}†{h.address}】 {h.excerpt}" for i, h in enumerate(hits)]
        links = {i: (hit.address, hit.excerpt) for i, hit in enumerate(hits)}
        title = f"Search results: {plain(query)[:100]}"
        return self._show(Page("", title, wrapped("\n".join(found)), links), 0, -1)

    async def _open(self, given: Mapping[str, Any]) -> str:
        loc, count = _number(given, "loc", -1), _number(given, "num_lines", -1)
        wanted = given.get("id", -1)
        if isinstance(wanted, str) and not wanted.isdigit():
            address, excerpt = wanted, ""
        else:
            page, link = self._page(_number(given, "cursor", -1)), _number(given, "id", -1)
            if link < 0:
                return self._show(page, max(loc, 0), count)
            if link not in page.links:
                raise ToolError(f"there is no link {link} on the page {page.title!r}")
            address, excerpt = page.links[link]
        document = await self._backend.fetch(address)
        links = {i: (where, "") for i, where in document.links.items()}
        page = Page(document.address, document.title, wrapped(document.text), links)
        return self._show(page, _passage(page.lines, excerpt) if loc < 0 else loc, count)

    def _find(self, pattern: str, cursor: int) -> str:
        page = self._page(cursor)
        lines = [LINK.sub(r"\1", line) for line in page.lines]
        said: list[str] = []
        links: dict[int, tuple[str, str]] = {}
        at = 0
        while at < len(lines) and len(links) < MOST_FINDS:
            if pattern.lower() not in lines[at].lower():
                at += 1
                continue
            some = lines[at : at + FIND_LINES]
            said += [f"# 【{len(links)}†match at L{at}】", *some, ""]
            links[len(links)] = (page.address, "\n".join(some))
            at += FIND_LINES
        if not links:
            raise ToolError(f"{pattern[:200]!r} is not on the page {page.title!r}")
        title = f"Find results for {plain(pattern)[:100]!r} in {page.title!r}"
        return self._show(Page(page.address, title, said, links), 0, -1)

    def _page(self, cursor: int) -> Page:
        if not self._pages:
            raise ToolError("no page is open yet; search first")
        if not -1 <= cursor < len(self._pages):
            raise ToolError(f"there is no cursor {cursor}; the last one is {len(self._pages) - 1}")
        return self._pages[cursor]

    def _show(self, page: Page, start: int, count: int) -> str:
        """Some lines of a page, which gets the next cursor unless it is the last one already."""
        if start >= max(1, len(page.lines)):
            raise ToolError(f"there is no line {start}; the last one is {len(page.lines) - 1}")
        if not self._pages or self._pages[-1] is not page:
            self._pages.append(page)
        shown: list[str] = []
        room = VIEW
        for i, line in enumerate(page.lines[start : start + count if count > 0 else None], start):
            shown.append(f"L{i}: {line}")
            room -= len(shown[-1]) + 1
            if room <= 0:
                break
        where = f" ({page.address})" if page.address else ""
        span = f"**viewing lines [{start} - {start + len(shown) - 1}] of {len(page.lines) - 1}**"
        return f"[{len(self._pages) - 1}] {page.title}{where}\n{span}\n\n" + "\n".join(shown)


def plain(text: str) -> str:
    """Text that cannot be taken for a link or a citation."""
    return text.translate(str.maketrans("【】†", "〖〗‡"))


def wrapped(text: str) -> list[str]:
    """Lines of at most WIDTH characters, as far as words allow."""
    lines = []
    for line in text.splitlines():
        kept = {"replace_whitespace": False, "drop_whitespace": False, "break_long_words": False}
        lines += textwrap.wrap(line, WIDTH, **kept) or [""]  # type: ignore[arg-type]
    return lines or [""]


def _passage(lines: Sequence[str], excerpt: str) -> int:
    """A few lines above the one with which an excerpt begins; 0 without an excerpt."""
    sought = " ".join(excerpt.split())
    begin = [len(commonprefix([sought, " ".join(line.split())])) for line in lines]
    return max(0, begin.index(max(begin)) - ABOVE) if sought else 0


def _arguments(text: str) -> dict[str, Any]:
    try:
        said = json.loads(text or "{}")
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        raise ToolError("the arguments are no JSON object")
    return said


def _text(given: Mapping[str, Any], key: str) -> str:
    value = given.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ToolError(f"{key} must be a text")
    return value


def _number(given: Mapping[str, Any], key: str, default: int) -> int:
    """The model writes numbers as it likes: 3, 3.0, "3"."""
    value = given.get(key)
    try:
        return default if value is None else int(float(value))
    except (TypeError, ValueError, OverflowError):
        raise ToolError(f"{key} must be a number") from None
