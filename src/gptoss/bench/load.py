"""Loading: from no process at all to the first token of a short prompt."""

import json
import subprocess
import sys
import time
from typing import Any, Unpack

from gptoss.backends.protocol import Batch
from gptoss.bench.cost import Cost, cost
from gptoss.bench.first import PROMPT
from gptoss.bench.report import Report
from gptoss.bench.subject import Loading, alternate, held
from gptoss.checkpoint.open import open_checkpoint
from gptoss.errors import GptOssError
from gptoss.llm.models import resolve
from gptoss.llm.plan import make_plan
from gptoss.llm.tokens import Progress, load_tokenizer

ROOM = 64  # tokens


def load(
    model: str, *, rounds: int = 3, watch: Progress | None = None, **loading: Unpack[Loading]
) -> Report:
    """Seconds from starting Python to the first token, in a process of its own each time.

    The system keeps files that were read in memory: unless it had to give them up, only the first
    round may read them from disk, and ``storage_bytes`` says how much each round did. "Bytes" are
    those of the checkpoint.

    Raises:
        ValueError, GptOssError: as ``TokenGenerator``.
    """
    path = resolve(model)
    checkpoint = open_checkpoint(path)
    options: dict[str, Any] = {"max_tokens": ROOM, **loading}
    force, announce = options.pop("force", False), options.pop("announce", None)
    plan = make_plan(checkpoint, **options)
    if announce is not None:
        announce(plan)
    if not force:
        plan.check()
    how = json.dumps({"checkpoint": str(path), "force": force, **options})
    seen: list[dict[str, int | None]] = []

    def work() -> float:
        seconds, memory = first_token(how)
        seen.append(memory)
        return seconds

    seconds, roofline = alternate(work, rounds, watch)
    tokens = load_tokenizer(checkpoint).encode(PROMPT)
    read = cost(checkpoint.config, held(plan, checkpoint.config), Batch.of([tokens], [0], [0]))
    disk = [s["storage_bytes"] for s in seen]
    return Report(
        benchmark="load",
        model=model,
        plan=plan,
        settings={"rounds": rounds},
        tokens=1,
        cost=Cost(checkpoint.nbytes, read.operations),
        seconds=seconds,
        roofline=roofline,
        peak_memory=max((s["peak_memory_bytes"] or 0 for s in seen), default=0) or None,
        more={
            "prompt_tokens": len(tokens),
            "checkpoint_bytes": checkpoint.nbytes,
            "storage_bytes": disk[0],
            "storage_bytes_by_round": disk,
        },
    )


def first_token(how: str) -> tuple[float, Any]:
    """Seconds to the first token in a new process, and the memory and disk it took."""
    command = [sys.executable, "-m", "gptoss.bench.first", how]
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        seconds = time.perf_counter() - started
        _, said = process.communicate()
    if process.returncode or not line:
        words = said.decode(errors="replace").strip().splitlines()
        raise GptOssError(words[-1] if words else f"loading ended with {process.returncode}")
    return seconds, json.loads(line)
