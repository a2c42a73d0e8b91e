"""Which files make up a checkpoint, and that they agree on which tensor is where."""

import re
from pathlib import Path

from gptoss.checkpoint import safetensors
from gptoss.checkpoint.files import read_json, shown, some
from gptoss.checkpoint.safetensors import HostTensor
from gptoss.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SUPPORTED = (
    "Give a directory with config.json and *.safetensors, in the original, the Hugging Face or "
    "the mlx-lm layout, or one .safetensors file with config.json beside it."
)
UNFINISHED = ("*.incomplete", "*.part", "*.partial", "*.crdownload", "*.aria2", "*.download")


def find(path: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The files to read, and which tensor the index (where there is one) puts in which."""
    if not path.is_dir():
        if not path.exists():
            raise CheckpointError(f"{path}: no such file or directory. {SUPPORTED}")
        if path.suffix == ".json":
            raise CheckpointError(f"{path}: holds no weights. {SUPPORTED}")
        return [path], None
    found = sorted(p for p in path.glob("*.safetensors") if not p.name.startswith("."))
    if (path / INDEX).exists():
        return _indexed(path, found)
    if not found:
        raise CheckpointError(f"{path}: {_instead(path)}. {SUPPORTED}")
    _check_numbering(path, [p.name for p in found])
    return found, None


def read_all(
    files: list[Path], placed: dict[str, str] | None, folder: Path
) -> dict[str, HostTensor]:
    """Every tensor of every file, each once and where the index says."""
    tensors: dict[str, HostTensor] = {}
    for file in files:
        for name, tensor in safetensors.read(file).items():
            if name in tensors:
                raise CheckpointError(
                    f"{file}: {shown(name)} is also in {tensors[name].path.name}. Which is meant? "
                    "Move the files of other checkpoints away."
                )
            tensors[name] = tensor
    for name, place in (placed or {}).items():
        there = tensors[name].path.name if name in tensors else "no file"
        if there != place:
            raise CheckpointError(
                f"{folder / INDEX}: {shown(name)} should be in {place}, but it is in {there}"
            )
    if placed is not None and (extra := [name for name in tensors if name not in placed]):
        raise CheckpointError(f"{folder / INDEX}: does not know the tensors {some(extra)}")
    return tensors


def unfinished(folder: Path) -> str:
    """The name of an unfinished download in the folder, or nothing."""
    for place in (folder, folder / ".cache" / "huggingface" / "download"):
        for pattern in UNFINISHED:
            for match in place.glob(pattern):
                return str(match)
    return ""


def _indexed(path: Path, found: list[Path]) -> tuple[list[Path], dict[str, str]]:
    index = path / INDEX
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(v, str) for v in placed.values()):
        raise CheckpointError(f"{index}: weight_map must map tensors to files; it is damaged")
    wanted = sorted(set(placed.values()))
    for name in wanted:
        if not re.fullmatch(r"[^/\\:\0]+\.safetensors", name):
            raise CheckpointError(
                f"{index}: {shown(name)} is not a .safetensors file of this directory"
            )
    if missing := [n for n in wanted if not (path / n).exists()]:
        raise CheckpointError(
            f"{index}: {len(missing)} of {len(wanted)} files are missing: {some(missing)}. "
            "Download them."
        )
    if extra := sorted({p.name for p in found} - set(wanted)):
        raise CheckpointError(
            f"{index}: does not know {some(extra)}, which lies beside it. Which weights are meant? "
            "Move the others away."
        )
    return [path / name for name in wanted], placed


def _instead(path: Path) -> str:
    """What a directory without weights has in their place."""
    if not any(path.iterdir()):
        return "the directory is empty"
    for kind, patterns in {
        "GGUF": ("*.gguf",),
        "PyTorch's pickled": ("*.bin", "*.pt", "*.pth"),
    }.items():
        if any(match for pattern in patterns for match in path.glob(pattern)):
            return f"has {kind} files, which are not read, and no .safetensors file"
    for inner in sorted(path.iterdir()):
        if inner.is_dir() and any(inner.glob("*.safetensors")):
            return f"has no .safetensors file itself, but {inner} has; perhaps that one is meant"
    return "has no .safetensors file"


def _check_numbering(path: Path, names: list[str]) -> None:
    """Of shards called x-00001-of-00003, all are there."""
    for name in names:
        if not (match := re.fullmatch(r"(.*-)(\d{1,6})(-of-)(\d{1,6})\.safetensors", name)):
            continue
        stem, number, of, total = match.groups()
        count = sum(n.startswith(stem) and n.endswith(f"{of}{total}.safetensors") for n in names)
        if count < int(total):
            raise CheckpointError(
                f"{path}: {count} of {int(total)} files like {name} are there. Download the others."
            )
