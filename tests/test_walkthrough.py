"""The page is what happens, the lines it shows are the source's, and the notebook is the page."""

import json
import re
import textwrap

import pytest

from runs.make_walkthrough import BLOCK, NOTEBOOK, PAGE, ROOT, notebook, printed, with_output

TEXT = PAGE.read_text(encoding="utf-8")
EXCERPTS = re.findall(r"```py (\S+)\n(.*?)```", TEXT, re.S)


@pytest.fixture(scope="module")
def said():
    return printed(TEXT)


def test_every_block_prints_what_the_page_shows(said):
    shown = re.findall(r"```text\n(.*?)```", TEXT, re.S)
    assert len(shown) == len(said) == TEXT.count("```python") > 10
    for block, ours, theirs in zip(BLOCK.findall(TEXT), shown, said, strict=True):
        assert theirs, f"a block without a result proves nothing: {block}"
        assert ours == theirs
    assert with_output(TEXT, said) == TEXT


def test_what_is_done_by_hand_is_what_the_model_does(said):
    assert "".join(said).count("by hand: True") == 4 and "False" not in "".join(said)


@pytest.mark.parametrize("file, lines", EXCERPTS)
def test_every_excerpt_stands_in_the_source(file, lines):
    source, lines = (ROOT / file).read_text(encoding="utf-8").splitlines(), lines.splitlines()
    found = [
        textwrap.dedent("\n".join(source[i : i + len(lines)])).splitlines()
        for i in range(len(source))
    ]
    assert lines in found, f"{file} has no longer:\n" + "\n".join(lines)


def test_the_wiring_is_quoted():
    files = [file for file, _ in EXCERPTS]
    assert files.count("src/gptoss/model/model.py") >= 5
    assert all(f"`{name}`" in TEXT or f"[`{name}`]" in TEXT for name in ("model.py", "ops.py"))


def test_the_notebook_is_the_page_with_its_results(said):
    stored = NOTEBOOK.read_text(encoding="utf-8")
    assert stored == notebook(TEXT, said), "run runs/make_walkthrough.py"
    cells = json.loads(stored)["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert ["".join(cell["outputs"][0]["text"]) for cell in code] == said
    assert len({cell["id"] for cell in cells}) == len(cells)
    assert "".join(map(str, cells)).count("# One token") == 1


def test_every_path_shown_exists():
    for path in re.findall(r"\]\(([^)#:]+)\)", TEXT):
        assert (PAGE.parent / path).exists(), path
