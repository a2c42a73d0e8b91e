"""The floor plan, enforced: imports point downstairs, and heavy ones stay in their room."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pytest

SRC = Path(__file__).parents[1] / "src" / "gptoss"
FLOORS = [
    {"errors"},
    {"model", "text"},
    {"checkpoint", "grammar", "tools"},
    {"backends"},
    {"engine"},
    {"llm"},
    {"server", "train", "verify", "sight", "bench"},
    {"cli"},
]
DATA = {"assets"}  # no code at all
DOORS = {"__init__", "__main__"}
FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}

# Every import that is neither the standard library nor ours, and the rooms it may be used in.
NUMERIC = (
    "model",
    "checkpoint",
    "grammar",
    "backends",
    "engine",
    "llm",
    "train",
    "verify",
    "sight",
    "bench",
)
ELSEWHERE = {
    "numpy": NUMERIC,
    "ml_dtypes": ("checkpoint", "backends", "train", "verify", "bench"),
    "tiktoken": ("text",),
    "llguidance": ("grammar",),
    "rich": ("cli",),
    "huggingface_hub": ("llm", "cli"),
    "fastapi": ("server",),
    "starlette": ("server",),
    "pydantic": ("server",),
    "uvicorn": ("server",),
    "prometheus_client": ("server",),
    "mcp": ("tools",),
    "torch": ("backends/torch", "backends/triton", "train"),
    "matplotlib": ("train", "sight"),
    "triton": ("backends/triton",),
    "mlx": ("backends/mlx", "train"),
    "ttnn": ("backends/ttnn",),
}
OPTIONAL = {
    "torch",
    "matplotlib",
    "triton",
    "mlx",
    "ttnn",
    "huggingface_hub",
    "llguidance",
    "fastapi",
    "starlette",
    "pydantic",
    "uvicorn",
    "prometheus_client",
    "mcp",
}  # the package works without
WHOLE = ("train", "server")  # rooms that need theirs altogether
COMPILED = ("backends/native", "bench")  # who calls gptoss._core: to run models, to measure
# Of the tests, never of the package.
JUDGES = {"transformers", "openai_harmony", "safetensors", "jsonschema"}
BORROWS = {"triton": {"torch"}}  # the one connecting door between rooms of backends/


@dataclass(frozen=True, slots=True)
class Import:
    """One imported module, by its full dotted name."""

    name: str
    lazy: bool  # inside a function


def imports(source: str) -> Iterator[Import]:
    """Every import of a module, wherever it stands; of ``from a import b`` it is a.b."""
    yield from _imports(ast.parse(source), lazy=False)


def _imports(node: ast.AST, *, lazy: bool) -> Iterator[Import]:
    lazy = lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
    if isinstance(node, ast.Import):
        yield from (Import(alias.name, lazy) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        origin = "." * node.level + (node.module or "")
        yield from (Import(f"{origin}.{alias.name}", lazy) for alias in node.names)
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
        ("import_module", "__import__")
    ):
        name = node.args[0]
        yield Import(str(name.value) if isinstance(name, ast.Constant) else "?", lazy)
    for child in ast.iter_child_nodes(node):
        yield from _imports(child, lazy=lazy)


def violations(file: str, source: str) -> list[str]:
    """What the file (its path under src/gptoss) may not say."""
    path = PurePosixPath(file)
    room = path.parts[0].removesuffix(".py")
    said = [f"{file}: {fault}" for found in imports(source) for fault in _faults(path, room, found)]
    if room != "cli":
        said += [f"{file}: only cli reads the environment" for _ in _environment_reads(source)]
    return said


def _faults(path: PurePosixPath, room: str, found: Import) -> Iterator[str]:
    top, *rest = found.name.split(".")
    if top == "":
        yield f"relative import of {found.name}"
    elif top == "?":
        if room != "__init__":  # the front door opens rooms by name
            yield "imports what only its running tells"
    elif top == "gptoss":
        yield from _faults_at_home(path, room, found, rest)
    elif top in JUDGES:
        yield f"{top} judges this package and is no part of it"
    elif top not in sys.stdlib_module_names:
        folder = path.parent.as_posix()
        rooms = ELSEWHERE.get(top, ())
        if not any(folder == r or folder.startswith(f"{r}/") for r in rooms):
            yield f"may not import {top}, only {', '.join(rooms) or 'nobody'} may"
        if top == "huggingface_hub" and not found.lazy:
            yield "huggingface_hub belongs inside a function"


def _faults_at_home(
    path: PurePosixPath, room: str, found: Import, rest: list[str]
) -> Iterator[str]:
    if room in DOORS:
        return  # the front door sees the whole house
    if rest and rest[0] == "_core":  # the compiled part
        if path.parent.as_posix() not in COMPILED:
            yield f"only {' and '.join(COMPILED)} may import gptoss._core"
        return
    if not rest or rest[0] not in FLOOR:
        if FLOOR[room] < len(FLOORS) - 1:  # ``from gptoss import x``: the front door
            yield f"may not import {found.name} from the front door"
        return
    theirs = rest[0]
    if theirs != room and FLOOR[theirs] >= FLOOR[room]:
        yield f"{room} (floor {FLOOR[room]}) may not import {theirs} (floor {FLOOR[theirs]})"
    if theirs != "backends" or len(rest) < 2 or rest[1] not in backend_rooms():
        return
    mine = path.parts[1] if room == "backends" and len(path.parts) > 2 else None
    if mine:
        if rest[1] not in {mine, *BORROWS.get(mine, ())}:
            yield f"backends/{mine} may not import backends/{rest[1]}"
    elif not found.lazy and room != "train":
        yield f"opens backends/{rest[1]} at import"


def backend_rooms() -> set[str]:
    """The rooms of backends/, those that are only planned too."""
    built = {p.name for p in (SRC / "backends").iterdir() if (p / "__init__.py").exists()}
    return built | {"reference", "native", "torch", "triton", "mlx", "ttnn"}


def _environment_reads(source: str) -> Iterator[ast.AST]:
    names = {"environ", "environb", "getenv", "getenvb", "expandvars"}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in names:
            yield node
        if isinstance(node, ast.ImportFrom) and names & {alias.name for alias in node.names}:
            yield node


FILES = sorted(path.relative_to(SRC).as_posix() for path in SRC.rglob("*.py"))


def test_there_are_files_to_look_at():
    assert {"model/model.py", "backends/protocol.py", "errors.py"} <= set(FILES)


def test_every_room_has_a_floor():
    rooms = {PurePosixPath(file).parts[0].removesuffix(".py") for file in FILES} - DOORS
    assert rooms <= set(FLOOR), f"no floor for {', '.join(sorted(rooms - set(FLOOR)))}"
    assert not rooms & DATA, "assets holds data, not code"


@pytest.mark.parametrize("file", FILES)
def test_imports_point_downstairs_and_heavy_ones_stay_in_their_room(file):
    assert violations(file, (SRC / file).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "file, source, fault",
    [
        ("model/a.py", "import gptoss.checkpoint", "model (floor 1) may not import checkpoint"),
        ("model/a.py", "from gptoss import text", "model (floor 1) may not import text (floor 1)"),
        ("model/a.py", "def f():\n    from gptoss.engine import x", "may not import engine"),
        ("model/a.py", "if TYPE_CHECKING:\n    from gptoss.llm import LLM", "may not import llm"),
        ("model/a.py", "import ml_dtypes", "may not import ml_dtypes"),
        ("model/a.py", "from importlib import import_module\nimport_module('torch')", "torch"),
        ("text/a.py", "import numpy", "may not import numpy"),
        ("errors.py", "from gptoss.model.config import x", "errors (floor 0) may not import model"),
        ("server/a.py", "from gptoss.train import x", "server (floor 6) may not import train"),
        ("engine/a.py", "from gptoss import __version__", "the front door"),
        ("engine/a.py", "from gptoss.backends.reference import x", "opens backends/reference"),
        ("engine/a.py", "import torch", "may not import torch, only backends/torch"),
        ("engine/a.py", "def f():\n    import torch.nn as nn", "may not import torch"),
        ("backends/__init__.py", "from gptoss.backends.torch import x", "opens backends/torch"),
        ("backends/a.py", "import torch", "may not import torch"),
        ("backends/torchlike/a.py", "import torch", "may not import torch"),
        ("backends/torch/a.py", "import triton", "may not import triton"),
        ("backends/native/a.py", "from gptoss.backends.torch import x", "backends/native may not"),
        (
            "backends/torch/a.py",
            "def f():\n    import gptoss.backends.triton",
            "backends/torch may",
        ),
        ("model/a.py", "from gptoss import _core", "only backends/native"),
        ("checkpoint/a.py", "from safetensors import safe_open", "safetensors judges"),
        ("verify/a.py", "import transformers", "transformers judges"),
        ("text/a.py", "from openai_harmony import x", "openai_harmony judges"),
        ("llm/a.py", "from huggingface_hub import x", "inside a function"),
        ("llm/a.py", "import requests", "may not import requests, only nobody may"),
        ("llm/a.py", "from .plan import x", "relative import of .plan"),
        ("llm/a.py", "import importlib\nimportlib.import_module(name)", "only its running tells"),
        ("llm/a.py", "import os\nos.environ['HOME']", "only cli reads the environment"),
        ("llm/a.py", "from os import getenv", "only cli reads the environment"),
    ],
)
def test_a_breach_is_seen(file, source, fault):
    assert any(fault in said for said in violations(file, source)), violations(file, source)


@pytest.mark.parametrize(
    "file, source",
    [
        ("checkpoint/a.py", "from gptoss.checkpoint import safetensors"),
        ("backends/triton/a.py", "import torch, triton\nfrom gptoss.backends.torch import x"),
        ("backends/__init__.py", "def f():\n    from gptoss.backends.torch import TorchBackend"),
        ("backends/native/a.py", "from gptoss import _core"),
        ("bench/a.py", "def f():\n    from gptoss import _core"),
        ("train/a.py", "import torch\nfrom gptoss.backends.torch.modules import Transformer"),
        ("cli/a.py", "import os\nfrom gptoss import __version__\nos.environ['GPTOSS_X']"),
        ("llm/a.py", "def f():\n    from huggingface_hub import snapshot_download"),
    ],
)
def test_what_the_plan_allows_is_allowed(file, source):
    assert violations(file, source) == []


ABSENT = """
import importlib, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {absent}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""
OPEN_ALL = """
for name in {modules}:
    importlib.import_module(name)
    print(name)
"""
RUN = """
from gptoss.backends import load_backend
from gptoss.backends.protocol import Batch, Sampling
from gptoss.errors import BackendUnavailable
from gptoss.model.config import nano
from gptoss.model.weights import random_weights

try:
    backend = load_backend({name!r}, nano(), random_weights(nano()).__getitem__)
except BackendUnavailable as error:
    print("unavailable:", error)
else:
    cache = backend.new_cache(max_tokens=3)
    logits = backend.forward(Batch.of([[1, 2, 3]], [0], [cache.open()]), cache)
    print("drawn:", *backend.sample(logits, [Sampling()], [0.5]))
"""


def python(code: str) -> str:
    """What a fresh interpreter prints; warnings are errors there too."""
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SRC.parent)},
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_every_room_but_those_of_heavy_libraries_opens_without_them():
    heavy = tuple(r for top in OPTIONAL for r in ELSEWHERE[top] if "/" in r or r in WHOLE)
    files = [f for f in FILES if not f.startswith(heavy) and not f.endswith("__main__.py")]
    modules = [
        ".".join(("gptoss", *PurePosixPath(f).with_suffix("").parts)).removesuffix(".__init__")
        for f in files
    ]
    assert {"gptoss", "gptoss.backends", "gptoss.model.model"} <= set(modules)
    code = ABSENT.format(absent=OPTIONAL | JUDGES) + OPEN_ALL.format(modules=modules)
    assert python(code).split() == modules


def test_the_reference_runs_without_the_heavy_libraries():
    code = ABSENT.format(absent=OPTIONAL | JUDGES) + RUN.format(name="reference")
    assert python(code).startswith("drawn: ")


def test_a_backend_whose_library_is_absent_says_so():
    code = ABSENT.format(absent=OPTIONAL | JUDGES) + RUN.format(name="torch")
    said = python(code)
    assert said.startswith("unavailable: ") and "torch" in said


def test_the_front_door_opens_no_heavy_room_even_where_they_are_installed():
    rooms = "import sys, gptoss, gptoss.backends, gptoss.engine, gptoss.llm, gptoss.cli.main"
    code = f"{rooms}\nprint(*(x for x in {sorted(OPTIONAL | JUDGES)} if x in sys.modules))"
    assert python(code).split() == []
