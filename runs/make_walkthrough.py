"""Run docs/walkthrough.md, put what it prints under its blocks, and write it as a notebook too.

    PYTHONPATH=src:. python runs/make_walkthrough.py

In the page, ``python`` blocks are run one behind the other; a ``text`` block is what the one above
it printed; a ``py FILE`` block is an excerpt of that file and only shown.
"""

import contextlib
import io
import json
import re
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "walkthrough.md"
NOTEBOOK = PAGE.with_suffix(".ipynb")
BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n```text\n.*?```\n)?", re.S)


def printed(page: str) -> list[str]:
    """What each block prints."""
    names: dict[str, object] = {"__name__": "walkthrough"}
    said = []
    with np.printoptions():  # which the page sets for itself
        for block in BLOCK.finditer(page):
            line = page[: block.start(1)].count("\n")  # so that a traceback points into the page
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile("\n" * line + block[1], PAGE, "exec"), names)
            said.append(out.getvalue())
    return said


def with_output(page: str, said: list[str]) -> str:
    """The page with what its blocks printed."""
    left = iter(said)

    def shown(block: re.Match[str]) -> str:
        return f"```python\n{block[1]}```\n\n```text\n{next(left)}```\n"

    return BLOCK.sub(shown, page)


def notebook(page: str, said: list[str]) -> str:
    """The same as a Jupyter notebook that has been run (nbformat 4.5)."""
    cells: list[dict[str, object]] = []
    prose, end = [], 0
    for block in BLOCK.finditer(page):
        prose.append(page[end : block.start()])
        end = block.end()
    for i, block in enumerate(BLOCK.finditer(page)):
        cells.append(_cell("markdown", f"prose-{i}", prose[i]))
        output = {"output_type": "stream", "name": "stdout", "text": _lines(said[i])}
        code = _cell("code", f"code-{i}", block[1])
        cells.append(code | {"execution_count": i + 1, "outputs": [output]})
    cells.append(_cell("markdown", "end", page[end:]))
    python = {"display_name": "Python 3", "language": "python", "name": "python3"}
    whole = {
        "cells": cells,
        "metadata": {"kernelspec": python, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def _cell(kind: str, name: str, source: str) -> dict[str, object]:
    return {"cell_type": kind, "id": name, "metadata": {}, "source": _lines(source.strip("\n"))}


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def main() -> None:
    """Rewrite both files."""
    page = PAGE.read_text(encoding="utf-8")
    said = printed(page)
    page = with_output(page, said)
    PAGE.write_text(page, encoding="utf-8")
    NOTEBOOK.write_text(notebook(page, said), encoding="utf-8")


if __name__ == "__main__":
    main()
