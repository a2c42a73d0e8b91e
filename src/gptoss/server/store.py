"""Responses that a client may come back to: in a SQLite file, or in memory without one.

What ``put`` has returned for is there after any end of the process, kill -9 and loss of power
included. A file belongs to one server at a time. In memory there is a bound, and the oldest go.
"""

import asyncio
import json
import os
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from gptoss.errors import GptOssError

MOST, CHARACTERS = 4096, 64 << 20  # responses and their characters, in memory
APPLICATION, VERSION = 0x67707473, 1  # marks of our files, in the header that SQLite has for it
OPEN = ("queued", "in_progress")
STOPPED = {"code": "server_error", "message": "the server stopped before the response was complete"}

SCHEMA = f"""
CREATE TABLE responses (
    id TEXT NOT NULL UNIQUE,
    status TEXT NOT NULL,
    size INTEGER NOT NULL,
    response TEXT NOT NULL,
    input TEXT NOT NULL
);
CREATE TABLE items (
    id TEXT NOT NULL,
    response TEXT NOT NULL REFERENCES responses (id) ON DELETE CASCADE,
    PRIMARY KEY (id, response)
) WITHOUT ROWID;
CREATE INDEX items_of ON items (response);
CREATE INDEX unfinished ON responses (status) WHERE status IN {OPEN};
PRAGMA application_id = {APPLICATION};
PRAGMA user_version = {VERSION};
"""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Record:
    """A response as the API has it, and the items that were its input."""

    response: dict[str, Any]
    input: Sequence[dict[str, Any]]  # of this request; the previous response has its own

    @property
    def items(self) -> list[dict[str, Any]]:
        """What a response that follows this one reads."""
        return [*self.input, *self.response["output"]]


class Store:
    """One thread owns the database. All of it is to be awaited, and in no order but its own."""

    def __init__(
        self, path: Path | None = None, *, most: int = MOST, characters: int = CHARACTERS
    ) -> None:
        """The bounds are those of memory: a file may grow. Raises GptOssError."""
        self._path, self._most, self._characters = path, most, characters
        self._thread = ThreadPoolExecutor(1, "gptoss-store")
        try:
            self._db = self._thread.submit(self._open).result()
        except (OSError, sqlite3.Error) as error:
            self._thread.shutdown()
            raise GptOssError(f"{path}: {_reason(error)}") from None
        except GptOssError:
            self._thread.shutdown()
            raise

    async def put(self, record: Record) -> None:
        """Keep it, in place of what had its id. Durable when this returns."""
        await self._do(lambda: self._put(record))

    async def get(self, id: str) -> Record | None:
        """None: there is no such response, or no longer."""
        return await self._do(lambda: self._get(id))

    async def item(self, id: str) -> dict[str, Any] | None:
        """An item of any response's input or output; the newest, if several have it."""
        return await self._do(lambda: self._item(id))

    async def delete(self, id: str) -> bool:
        """Whether there was one."""
        return await self._do(lambda: self._delete(id))

    async def close(self) -> None:
        """Nothing may follow."""
        await self._do(self._db.close)
        self._thread.shutdown()

    async def _do(self, job: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, job)

    # What follows runs in the thread.

    def _open(self) -> sqlite3.Connection:
        if self._path is not None:  # what was said is not for everybody on this machine
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600))
        db = sqlite3.connect(self._path or ":memory:", timeout=1.0)
        try:
            self._prepare(db)
        except BaseException:
            db.close()
            raise
        return db

    def _prepare(self, db: sqlite3.Connection) -> None:
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        marks = [
            db.execute(f"PRAGMA {p}").fetchone()[0] for p in ("application_id", "user_version")
        ]
        fresh = db.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)
        if not fresh and marks != [APPLICATION, VERSION]:
            raise GptOssError(f"{self._path}: a database, but not one of responses of this version")
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
            db.execute(f"PRAGMA {pragma}")
        if fresh:
            db.executescript(f"BEGIN; {SCHEMA} COMMIT;")
        with db:  # also takes the file's lock
            for id, text in db.execute(
                f"SELECT id, response FROM responses WHERE status IN {OPEN}"
            ).fetchall():
                response = json.dumps(_stopped(json.loads(text)))
                db.execute(
                    "UPDATE responses SET status = 'failed', response = ? WHERE id = ?",
                    (response, id),
                )

    def _put(self, record: Record) -> None:
        response, given = json.dumps(record.response), json.dumps(record.input)
        id, status = record.response["id"], record.response["status"]
        with self._db as db:
            db.execute(
                "INSERT INTO responses (id, status, size, response, input) VALUES (?, ?, ?, ?, ?)"
                " ON CONFLICT (id) DO UPDATE SET"
                " status = excluded.status, size = excluded.size, response = excluded.response",
                (id, status, len(response) + len(given), response, given),
            )
            db.executemany(
                "INSERT OR IGNORE INTO items VALUES (?, ?)", [(x["id"], id) for x in record.items]
            )
            if self._path is None:
                self._bound(db)

    def _bound(self, db: sqlite3.Connection) -> None:
        """Drop the oldest, but never the newest."""
        count, size = db.execute("SELECT count(*), sum(size) FROM responses").fetchone()
        while count > 1 and (count > self._most or size > self._characters):
            [(row, less)] = db.execute("SELECT rowid, size FROM responses ORDER BY rowid LIMIT 1")
            db.execute("DELETE FROM responses WHERE rowid = ?", (row,))
            count, size = count - 1, size - less

    def _get(self, id: str) -> Record | None:
        found = self._db.execute("SELECT response, input FROM responses WHERE id = ?", (id,))
        row = found.fetchone()
        return row and Record(*map(json.loads, row))

    def _item(self, id: str) -> dict[str, Any] | None:
        row = self._db.execute(
            "SELECT r.response, r.input FROM items i JOIN responses r ON r.id = i.response"
            " WHERE i.id = ? ORDER BY r.rowid DESC LIMIT 1",
            (id,),
        ).fetchone()
        items = row and Record(*map(json.loads, row)).items
        return next((item for item in items or () if item["id"] == id), None)

    def _delete(self, id: str) -> bool:
        with self._db as db:
            return db.execute("DELETE FROM responses WHERE id = ?", (id,)).rowcount > 0


def _stopped(response: dict[str, Any]) -> dict[str, Any]:
    """What became of a response whose server is gone."""
    return response | {"status": "failed", "error": STOPPED}


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if "locked" in str(error):
        return "another server uses this file; each needs its own"
    return f"no database of responses: {error}"
