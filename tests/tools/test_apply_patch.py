"""Patches as the model writes them: where they fit, and that nothing happens where they do not."""

import json

import pytest

from gptoss.tools.apply_patch import ApplyPatch

BEGIN, END = "*** Begin Patch\n", "*** End Patch"


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "app.py").write_text(
        "import os\n\ndef a():\n    return 1\n\ndef b():\n    return 1\n"
    )
    (folder / "notes.txt").write_text("one\ntwo\nthree")
    (folder / "crlf.txt").write_bytes(b"one\r\ntwo\r\n")
    (tmp_path / "outside.txt").write_text("untouched\n")
    return folder


@pytest.fixture
def patch(talk, folder):
    conversation = talk(ApplyPatch(folder))

    def apply(body, fails=False):
        talk = conversation.refused if fails else conversation
        return talk("functions.apply_patch", f"{BEGIN}{body}\n{END}")

    return apply


def seen(folder):
    """All there is, files outside included."""
    root = folder.parent
    return {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_all_operations_in_one_patch(patch, folder):
    said = patch(
        "*** Add File: deep/er/new.txt\n+hello\n+\n"
        "*** Update File: app.py\n*** Move to: main.py\n@@ def b():\n-    return 1\n+    return 2\n"
        "*** Delete File: notes.txt"
    )
    assert said == "Done!\nA deep/er/new.txt\nU main.py\nD notes.txt"
    assert (folder / "deep/er/new.txt").read_text() == "hello\n\n"
    assert (folder / "main.py").read_text().endswith("def b():\n    return 2\n")
    assert "def a():\n    return 1\n" in (folder / "main.py").read_text()
    left = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert left == {"deep/er/new.txt", "main.py", "crlf.txt"}, "nothing is left lying about"


@pytest.mark.parametrize(
    "hunks, after",
    [
        ("@@\n one\n-two\n+2\n three", "one\n2\nthree"),
        (" one\n+and a half\n two", "one\nand a half\ntwo\nthree"),
        ("@@\n-one\n@@\n-three\n+3", "two\n3"),
        ("@@ two\n+between", "one\ntwo\nbetween\nthree"),
        ("@@\n+four", "one\ntwo\nthree\nfour"),
        ("@@\n three\n+four\n*** End of File", "one\ntwo\nthree\nfour"),
        ("@@\n   two  \n-three\n+3", "one\ntwo\n3"),
        ("@@\n-two\n+2\n\n", "one\n2\nthree"),
    ],
)
def test_hunks_find_their_place(patch, folder, hunks, after):
    patch(f"*** Update File: notes.txt\n{hunks}")
    assert (folder / "notes.txt").read_text() == after


def test_endings_and_permissions_stay(patch, folder):
    (folder / "crlf.txt").chmod(0o750)
    patch("*** Update File: crlf.txt\n@@\n one\n-two\n+2\n+3")
    assert (folder / "crlf.txt").read_bytes() == b"one\r\n2\r\n3\r\n"
    assert (folder / "crlf.txt").stat().st_mode & 0o777 == 0o750


def test_a_call_may_be_wrapped_in_json(talk, folder):
    text = f"{BEGIN}*** Add File: a\n+b\n{END}"
    conversation = talk(ApplyPatch(folder))
    conversation("functions.apply_patch", json.dumps({"patch": text}))
    conversation("functions.apply_patch", json.dumps(text.replace(": a", ": c")))
    assert (folder / "a").read_text() == (folder / "c").read_text() == "b\n"
    assert "one argument" in conversation.refused("functions.apply_patch", '{"a": "", "b": ""}')


@pytest.mark.parametrize(
    "path",
    [
        *(
            "../outside.txt",
            "/etc/hosts",
            "a/../../outside.txt",
            "link/x.txt",
            "hard",
            "",
            ".",
            ".git/config",
            "a/.GIT/b",
        ),
        *("a\0b", "\ud800", "a" * 300, "a/" * 3000 + "a"),
    ],
)
@pytest.mark.parametrize("how", ["Add", "Update", "Delete", "Move"])
def test_no_path_leads_out_of_the_folder(patch, folder, path, how):
    (folder / "link").symlink_to(folder.parent)
    (folder / "hard").symlink_to(folder.parent / "outside.txt")
    before = seen(folder)
    body = {
        "Add": f"*** Add File: {path}\n+x",
        "Update": f"*** Update File: {path}\n@@\n-untouched\n+x",
        "Delete": f"*** Delete File: {path}",
        "Move": f"*** Update File: notes.txt\n*** Move to: {path}\n@@\n-two\n+x",
    }[how]
    said = patch(body, fails=True)
    assert "no path" in said or "link" in said or "git" in said
    assert seen(folder) == before


@pytest.mark.parametrize(
    "second, told",
    [
        ("*** Update File: app.py\n@@\n-nope\n+x", "app.py: hunk 1 does not fit"),
        ("*** Update File: nix.py\n@@\n-a\n+x", "nix.py: there is no such file"),
        ("*** Update File: app.py", "says to update it, and not how"),
        ("*** Delete File: nix", "there is no such file"),
        ("*** Add File: notes.txt\n+x", "exists already"),
        ("*** Add File: notes.txt/x\n+x", "nothing was changed"),
        ("*** Add File: new/x\n+x\n*** Add File: notes.txt/x\n+x", "nothing was changed"),
        ("*** Update File: app.py\n*** Move to: notes.txt\n@@\n-import os\n+x", "exists already"),
        ("*** Add File: x.txt\nwithout a sign", "line 7 of the patch cannot be there"),
        ("*** Add File: bad.txt\n+\ud800", "cannot be written as UTF-8"),
        ("*** Delete File: crlf.txt", "names it twice"),
    ],
)
def test_all_or_nothing(patch, folder, second, told):
    before = seen(folder)
    said = patch(f"*** Update File: crlf.txt\n@@\n-one\n+1\n{second}", fails=True)
    assert told in said
    assert seen(folder) == before and not (folder / "new").exists()


@pytest.mark.parametrize(
    "text", ["", "hello", "[" * 9999, "*** Begin Patch", f"{BEGIN}{END}", f"{BEGIN}+a\n"]
)
def test_what_is_no_patch_is_told(talk, folder, text):
    assert talk(ApplyPatch(folder)).refused("functions.apply_patch", text)


def test_a_failure_half_way_is_undone(patch, folder, monkeypatch):
    import os

    before, replace = seen(folder), os.replace
    calls = []

    def failing(old, new):
        calls.append(new)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        replace(old, new)

    monkeypatch.setattr(os, "replace", failing)
    body = "*** Update File: app.py\n@@\n-import os\n+x\n*** Update File: notes.txt\n@@\n-two\n+x"
    assert "No space left" in patch(body, fails=True)
    assert seen(folder) == before
