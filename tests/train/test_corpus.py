"""Files of lines: any order that the seed decides, any position, the first bad line by its name."""

import pytest

pytest.importorskip("torch")

import json

import numpy as np

from gptoss.errors import TrainingError
from gptoss.train import corpus as subject
from gptoss.train.batch import Document
from gptoss.train.corpus import Corpus
from gptoss.train.lint import lint


def render(raw, origin):
    """A number n is a document of n tokens; a list is several."""
    sizes = raw if isinstance(raw, list) else [raw]
    if any(n < 0 for n in sizes):
        raise ValueError("less than nothing")
    return [Document([n] * n, [n] * n, origin) for n in sizes]


def write(path, *rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def origins(corpus, steps, position=None):
    found = []
    for _ in range(steps):
        batches, position = corpus.draw(position, tokens=12, batches=2)
        found += [(batch.origin, tuple(batch.lengths)) for batch in batches]
    return found


def test_every_epoch_is_another_permutation(tmp_path):
    corpus = Corpus([write(tmp_path / "a", *range(1, 6)), write(tmp_path / "b", 6, 7)], render)
    epochs = [[corpus.at(i + 7 * e)[0].tokens[0] for i in range(7)] for e in range(4)]
    assert all(sorted(epoch) == list(range(1, 8)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1
    again = Corpus(corpus.paths, render)
    assert [again.at(i)[0].tokens[0] for i in range(7)] == epochs[0]
    other = Corpus(corpus.paths, render, seed=1)
    assert [[other.at(i + 7 * e)[0].tokens[0] for i in range(7)] for e in range(4)] != epochs


def test_drawing_goes_on_from_any_position(tmp_path):
    """Batches are within their budget, nothing is lost, nothing comes twice."""
    path = write(tmp_path / "a", 5, [3, 4, 9], 12, 1, [2, 2], 7)
    corpus = Corpus([path], render)
    position, cut = None, []
    for _ in range(6):
        cut += origins(Corpus([path], render), 1, position)
        _, position = corpus.draw(position, tokens=12, batches=2)
    assert cut == origins(corpus, 6)
    sizes = [n for _, lengths in cut for n in lengths]
    assert all(sum(lengths) <= 12 for _, lengths in cut)
    whole = [len(d.tokens) for i in range(40) for d in corpus.at(i)]
    assert sizes == whole[: len(sizes)]


def test_lines_are_found_however_the_file_is_read(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(b"\n1\n\n\n22\r\n  333\n4")
    whole = Corpus([path], render)
    monkeypatch.setattr(subject, "BLOCK", 2)
    pieces = Corpus([path], render)
    for corpus in (whole, pieces):
        assert [corpus.line(i)[0].origin.split()[-1] for i in range(4)] == ["2", "5", "6", "7"]
    assert whole.checksums == pieces.checksums
    path.write_bytes(path.read_bytes() + b"0")
    assert Corpus([path], render).checksums != whole.checksums


def test_a_large_file_takes_24_bytes_a_line(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"7\n" * 100_000)
    corpus = Corpus([path], render)
    corpus.at(0)
    held = [*corpus._starts, *corpus._numbers, corpus._order[1]]
    assert sum(array.nbytes for array in held) <= 24 * len(corpus)
    assert all(array.dtype == np.int64 for array in held)


@pytest.mark.parametrize(
    "line, said",
    [
        (b"{", r"line 2: not valid JSON \(.*\)"),
        (b"\xff", r"line 2: not UTF-8 text \(byte 0\)"),
        (b"-1", "line 2: less than nothing"),
        (b"[" * 100_000, "line 2: (JSON nested too deeply|not valid JSON)"),
    ],
)
def test_the_first_bad_line_is_named(tmp_path, line, said):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"1\n" + line + b"\n-1\n")
    with pytest.raises(TrainingError, match=f"a.jsonl {said}") as error:
        lint(Corpus([path], render))
    assert "\n" not in str(error.value)


def test_files_without_lines_are_refused(tmp_path):
    (tmp_path / "a").write_bytes(b"\n\n")
    with pytest.raises(TrainingError, match="there is no line in it"):
        Corpus([tmp_path / "a"], render)
    with pytest.raises(TrainingError, match="b: cannot be read: No such file"):
        Corpus([tmp_path / "b"], render)


def test_lint_counts(tmp_path):
    contents = lint(Corpus([write(tmp_path / "a", 5, [3, 4])], render))
    assert (contents.lines, contents.documents, contents.tokens) == (2, 3, 12)
    assert "12 tokens, 12 of them learned, 5 in the longest" in str(contents)
