"""Where models are: the one in the package, paths, Hugging Face ids, and what lies around."""

import re
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gptoss.checkpoint.open import Checkpoint, open_checkpoint
from gptoss.errors import CheckpointError, GptOssError

NANO = Path(__file__).parent.parent / "assets" / "nano"
PUBLISHED = {"20b": "openai/gpt-oss-20b", "120b": "openai/gpt-oss-120b"}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
WANTED = ["*.safetensors", "*.safetensors.index.json", "config.json", "tokenizer.json"]
UNWANTED = ["original/*", "metal/*"]  # the same weights again, for other programs
NEAR = Path("checkpoints")  # looked into by ``found``


@dataclass(frozen=True, slots=True)
class Found:
    """A checkpoint on this machine."""

    name: str  # what to pass as the model
    checkpoint: Checkpoint


def resolve(model: str | Path) -> Path:
    """The path of a model: "nano", an existing path, or a Hugging Face id, downloaded if need be.

    Raises:
        GptOssError: it is none of these, or it cannot be downloaded.
    """
    if model == "nano":
        return NANO
    with suppress(RuntimeError, OSError):  # nobody's home; a name too long for any file
        path = Path(model).expanduser()
        if path.exists():
            return path
    name = PUBLISHED.get(str(model), str(model))
    if HUB_ID.fullmatch(name):
        return _download(name)
    raise CheckpointError(
        f"{model}: no such file or directory, and no Hugging Face id (org/name) either. "
        "`gptoss models` lists what there is."
    )


def found() -> list[Found]:
    """What can be opened in ./checkpoints and in the Hugging Face cache, by headers alone."""
    candidates = {str(p): p for p in sorted(NEAR.glob("*")) if p.is_dir()} | _cached()
    if NANO.is_dir():
        candidates = {"nano": NANO} | candidates
    usable = []
    for name, path in candidates.items():
        try:
            usable.append(Found(name, open_checkpoint(path)))
        except CheckpointError:
            continue  # some other model; opening it by name says what is wrong
    return usable


def _cached() -> dict[str, Path]:
    """Snapshots in the Hugging Face cache that have a config: id -> folder."""
    try:
        from huggingface_hub import scan_cache_dir
        from huggingface_hub.errors import CacheNotFound
    except ImportError:
        return {}
    try:
        repos = scan_cache_dir().repos
    except (CacheNotFound, ValueError, OSError):  # none, or none that can be read
        return {}
    models = {}
    for repo in sorted(repos, key=lambda r: r.repo_id):
        newest = max(repo.revisions, key=lambda r: r.last_modified, default=None)
        if repo.repo_type == "model" and newest and (newest.snapshot_path / "config.json").exists():
            models[repo.repo_id] = Path(newest.snapshot_path)
    return models


def _download(name: str) -> Path:
    """A snapshot of a Hugging Face repository; what is there and whole is not asked for again."""
    try:
        import huggingface_hub as hub
        from huggingface_hub.errors import (  # type: ignore[attr-defined]
            HTTPError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
        )
        from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]
    except ImportError:
        raise GptOssError(
            f"{name}: downloading needs huggingface_hub. Install it with `pip install "
            "'gptoss[hub]'`, or give the directory of a checkpoint."
        ) from None
    if (path := _whole_snapshot(name)) is not None:
        return path
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        return Path(hub.snapshot_download(name, allow_patterns=WANTED, ignore_patterns=UNWANTED))
    except RepositoryNotFoundError:
        raise GptOssError(f"{name}: Hugging Face has no such model, or it is not public") from None
    except (HTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise GptOssError(
            f"{name}: cannot be downloaded ({reason}). Check the network and the free disk, or "
            "give the directory of a checkpoint."
        ) from None


def _whole_snapshot(name: str) -> Path | None:
    """What an earlier download left, if it is a complete checkpoint: no network is needed then."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        path = Path(snapshot_download(name, local_files_only=True))
        open_checkpoint(path)
    except HFValidationError as error:
        raise GptOssError(f"{name}: {error}") from None
    except (LocalEntryNotFoundError, CheckpointError):
        return None
    return path
