"""Arguments that several commands take, and loading a model with them."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from gptoss.cli.arguments import Argument, Option, WrongCommandLine
from gptoss.cli.endings import usage
from gptoss.cli.terminal import bar

if TYPE_CHECKING:
    from gptoss.llm import LLM
    from gptoss.llm.llm import Options

Model = Annotated[
    str,
    Argument(help='"nano", a checkpoint\'s path, or a Hugging Face id', envvar="GPTOSS_MODEL"),
]
Backend = Annotated[
    str,
    Option(
        "-b", "--backend", help="auto, native, torch, mlx or reference", envvar="GPTOSS_BACKEND"
    ),
]
Precision = Annotated[
    Literal["exact", "fast", "small"] | None,
    Option(
        help="native: weights as published, or 8 bits; mlx: or dense matrices in 4",
        default="native: fast, of a narrow model exact; mlx: exact",
    ),
]
Threads = Annotated[
    int | None, Option(min=1, help="native: how many compute", default="one for each core")
]
Kv = Annotated[
    Literal["bfloat16", "float32", "int8"] | None,
    Option(help="how keys and values are kept; mlx: int8", default="bfloat16, exact: float32"),
]
Memory = Annotated[
    str | None,
    Option(
        help="native: most to take, as 12GB; experts beyond stay on disk", default="what is free"
    ),
]
Dtype = Annotated[
    str | None, Option(help="torch, mlx, reference: compute in float32, bfloat16 or float64")
]
Device = Annotated[
    str | None, Option(help="torch: cpu or cuda; mlx: cpu or gpu", default="what there is")
]
Context = Annotated[
    int | None,
    Option(min=1, help="room for conversation and answer, in tokens", default="16384"),
]
Force = Annotated[bool, Option(help="load even if memory is too little")]
Quiet = Annotated[bool, Option("-q", "--quiet", help="do not say how the model is loaded")]
Json = Annotated[bool, Option("--json", help="one JSON document on stdout")]
Level = Literal["low", "medium", "high"]
Effort = Annotated[Level, Option(help="how much the model thinks first")]
Temperature = Annotated[
    float, Option("-t", "--temperature", min=0.0, help="0 takes the likeliest token always")
]
Limit = Annotated[int | None, Option("-l", "--limit", min=1, help="most tokens of the answer")]
TopK = Annotated[int, Option(min=0, help="draw from the k likeliest; 0: from all")]
TopP = Annotated[float, Option(help="draw from the likeliest that make up p")]
MinP = Annotated[float, Option(min=0.0, max=1.0, help="least fraction of the likeliest's share")]
Seed = Annotated[int | None, Option(min=0, help="the same seed gives the same answer")]


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How tokens are drawn."""

    temperature: Temperature = 1.0
    limit: Limit = None
    top_k: TopK = 0
    top_p: TopP = 1.0
    min_p: MinP = 0.0
    seed: Seed = None

    def checked(self) -> Options:
        """The same for the library. A slip must not wait for a large model to be loaded."""
        from gptoss.backends.protocol import Sampling
        from gptoss.engine import uniform

        with usage():
            Sampling(
                temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p
            )
            uniform(self.seed or 0, 0)
        return {
            "temperature": self.temperature,
            "max_tokens": self.limit,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "seed": self.seed,
        }


def size(text: str | None) -> int | None:
    """Bytes, of "12GB" or "800 MB"; a number without a unit counts bytes."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:([kmgt])?b)?", text.strip(), re.IGNORECASE)
    if found is None:
        raise WrongCommandLine(f"--memory: {text!r} is not a size such as 12GB")
    unit = 1000.0 ** " kmgt".index((found[2] or " ").lower())
    return round(float(found[1]) * unit)


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How a model is run."""

    backend: Backend = "auto"
    precision: Precision = None
    threads: Threads = None
    kv: Kv = None
    memory: Memory = None
    dtype: Dtype = None
    device: Device = None
    context: Context = None
    force: Force = False
    quiet: Quiet = False

    def load(self, model: str, conversations: int = 1) -> LLM:
        """The model, after saying on stderr how it will be run."""
        from gptoss.llm import LLM

        def announce(plan: object) -> None:
            print(plan, file=sys.stderr, flush=True)

        with usage(), bar("loading") as progress:
            return LLM.load(
                model,
                self.backend,
                self.dtype,
                self.device,
                self.context,
                precision=self.precision,
                threads=self.threads,
                kv=self.kv,
                memory=size(self.memory),
                conversations=conversations,
                force=self.force,
                announce=None if self.quiet else announce,
                progress=progress,
            )
