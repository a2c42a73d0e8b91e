"""A local folder to browse: text, Markdown and HTML, searched by SQLite's full-text index (BM25).

The index is made once, in memory. An address is a path in the folder; nothing else can be opened:
no other file, through no link, and nothing in any network.
"""

import posixpath
import re
import sqlite3
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from gptoss.errors import ToolUnavailable
from gptoss.tools.browser import Document, Hit, plain
from gptoss.tools.call import ToolError

KINDS = (".txt", ".md", ".markdown", ".rst", ".html", ".htm")
MOST_BYTES, MOST_FILES = 4 << 20, 20_000  # of one file; of the folder
PASSAGE, EXCERPT = 12, 300  # lines, and characters, of what a search shows
MARKDOWN = re.compile(r"!?\[([^\]\n]{1,300})\]\(<?([^)\s>]{1,500})>?[^)\n]*\)")


class Folder:
    """See ``browser.Backend``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._index = sqlite3.connect(":memory:", check_same_thread=False)
        self._files: set[str] = set()

    async def start(self) -> None:
        """See Backend.start."""
        if not self._folder.is_dir():
            raise ToolUnavailable(f"browser: there is no folder {self._folder}")
        self._folder = self._folder.resolve()
        self._index.execute(
            "create virtual table passages using fts5(address unindexed, title, text, "
            "tokenize='porter unicode61')"
        )
        for path in sorted(self._folder.rglob("*")):
            address = path.relative_to(self._folder).as_posix()
            if path.suffix.lower() in KINDS and self._inside(path):
                self._files.add(address)
                self._index.executemany(
                    "insert into passages values (?, ?, ?)", _passages(self._read(address))
                )
            if len(self._files) > MOST_FILES:
                raise ToolUnavailable(f"browser: more than {MOST_FILES} files in {self._folder}")
        if not self._files:
            kinds = ", ".join(KINDS)
            raise ToolUnavailable(f"browser: no documents ({kinds}) in {self._folder}")

    async def search(self, query: str, count: int) -> Sequence[Hit]:
        """See Backend.search: documents by their best passage; rare words and titles count more."""
        words = re.findall(r"\w+", query)[:32]
        if not words:
            raise ToolError("the query has no words")
        rows = self._index.execute(
            "select address, title, text from passages where passages match ? "
            "order by bm25(passages, 0, 4, 1) limit ?",
            (" OR ".join(f'"{word}"' for word in words), 20 * count),
        )
        best: dict[str, Hit] = {}
        for address, title, text in rows:
            best.setdefault(address, Hit(address, title, _excerpt(text, words)))
        return list(best.values())[:count]

    async def fetch(self, address: str) -> Document:
        """See Backend.fetch."""
        path = posixpath.normpath(unquote(address).removeprefix("file://").lstrip("/"))
        if path not in self._files or not self._inside(self._folder / path):
            raise ToolError(f"{address[:200]!r} is none of the documents here; search finds them")
        return self._read(path)

    def _inside(self, path: Path) -> bool:
        try:
            return path.is_file() and path.resolve().is_relative_to(self._folder)
        except (OSError, RuntimeError):
            return False

    def _read(self, address: str) -> Document:
        try:
            with (self._folder / address).open("rb") as file:
                text = file.read(MOST_BYTES).decode("utf-8", "replace")
        except OSError as error:
            raise ToolError(f"{address}: {error.strerror}") from None
        links = Links(address, self._files)
        kind = posixpath.splitext(address)[1].lower()
        if kind in (".html", ".htm"):
            page = Html(links)
            page.feed(text)
            page.close()
            return Document(address, page.title or address, page.text, links.addresses)
        shown = plain(text)
        if kind in (".md", ".markdown"):
            shown = MARKDOWN.sub(lambda m: links.shown(m[2], m[1]), shown)
        first = next((line.strip(" #=*\t") for line in shown.splitlines() if line.strip()), "")
        title = first if kind in (".md", ".markdown", ".rst") else ""
        return Document(address, title[:120] or address, shown, links.addresses)


class Links:
    """The links of one document, numbered as they come; only those to other documents are."""

    def __init__(self, address: str, files: set[str]) -> None:
        self._address, self._files = address, files
        self.addresses: dict[int, str] = {}

    def shown(self, target: str, text: str) -> str:
        """As the model sees it."""
        try:
            parts = urlsplit(target)
        except ValueError:
            return text
        base = posixpath.dirname(self._address)
        path = posixpath.normpath(posixpath.join(base, unquote(parts.path)))
        if parts.scheme or parts.netloc or path not in self._files:
            return text
        self.addresses[len(self.addresses)] = path
        return f"【{len(self.addresses) - 1}†{text}】"


class Html(HTMLParser):
    """A document's title and text."""

    BLOCKS = frozenset("p div br li tr h1 h2 h3 h4 h5 h6 section article table pre".split())
    SILENT = frozenset("script style noscript template".split())

    def __init__(self, links: Links) -> None:
        super().__init__()
        self._links, self._parts, self._silent = links, list[str](), 0
        self._title: list[str] | None = None
        self._open: tuple[str, int] | None = None  # a link: where it leads, where its text begins
        self.title = ""

    @property
    def text(self) -> str:
        """With its links; lines without blanks around them."""
        lines = (" ".join(line.split()) for line in "".join(self._parts).split("\n"))
        return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """See HTMLParser."""
        self._silent += tag in self.SILENT
        if tag in self.BLOCKS:
            self._parts.append("\n* " if tag == "li" else "\n")
        elif tag == "title" and not self.title:
            self._title = []
        elif tag == "a":
            self._open = (dict(attrs).get("href") or "", len(self._parts))

    def handle_endtag(self, tag: str) -> None:
        """See HTMLParser."""
        self._silent -= tag in self.SILENT and self._silent > 0
        if tag in self.BLOCKS:
            self._parts.append("\n")
        elif tag == "title" and self._title is not None:
            self.title, self._title = " ".join("".join(self._title).split())[:120], None
        elif tag == "a" and self._open:
            target, start = self._open
            text = " ".join("".join(self._parts[start:]).split())
            self._parts[start:] = [self._links.shown(target, text) if text else ""]
            self._open = None

    def handle_data(self, data: str) -> None:
        """See HTMLParser."""
        if self._title is not None:
            self._title.append(plain(data))
        elif not self._silent:
            self._parts.append(plain(data).replace("\n", " "))


def _passages(document: Document) -> Iterator[tuple[str, str, str]]:
    lines = document.text.splitlines()
    for start in range(0, max(1, len(lines)), PASSAGE):
        text = "\n".join(lines[start : start + PASSAGE])
        yield document.address, document.title, text


def _excerpt(text: str, words: Sequence[str]) -> str:
    """From the line that has most of the words."""
    lines = text.splitlines() or [""]
    score = [sum(word.lower() in line.lower() for word in words) for line in lines]
    start = score.index(max(score))
    return " ".join(" ".join(lines[start:]).split())[:EXCERPT]
