"""Arguments that several commands take, and loading a model with them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from gptoss.cli.endings import usage
from gptoss.cli.terminal import bar

if TYPE_CHECKING:
    from gptoss.llm import LLM
    from gptoss.llm.llm import Options

Model = Annotated[
    str,
    typer.Argument(
        help='"nano", a checkpoint\'s path, or a Hugging Face id', envvar="GPTOSS_MODEL"
    ),
]
Backend = Annotated[
    str,
    typer.Option("-b", "--backend", help="auto, reference or torch", envvar="GPTOSS_BACKEND"),
]
Dtype = Annotated[
    str | None, typer.Option(help="compute in float32, bfloat16 or float64", show_default=False)
]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; by default what there is")]
Context = Annotated[
    int | None,
    typer.Option(min=1, help="room for conversation and answer, in tokens", show_default="16384"),
]
Force = Annotated[bool, typer.Option("--force", help="load even if memory is too little")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="do not say how the model is loaded")]
Json = Annotated[bool, typer.Option("--json", help="one JSON document on stdout")]
Level = Literal["low", "medium", "high"]
Effort = Annotated[Level, typer.Option(help="how much the model thinks first")]
Temperature = Annotated[
    float, typer.Option("-t", "--temperature", min=0.0, help="0 takes the likeliest token always")
]
Limit = Annotated[
    int | None, typer.Option("-l", "--limit", min=1, help="most tokens of the answer")
]
TopK = Annotated[int, typer.Option("--top-k", min=0, help="draw from the k likeliest; 0: from all")]
TopP = Annotated[float, typer.Option("--top-p", help="draw from the likeliest that make up p")]
MinP = Annotated[
    float, typer.Option("--min-p", min=0.0, max=1.0, help="least fraction of the likeliest's share")
]
Seed = Annotated[
    int | None, typer.Option(min=0, help="the same seed gives the same answer", show_default=False)
]


def drawing(
    temperature: float, limit: int | None, top_k: int, top_p: float, min_p: float, seed: int | None
) -> Options:
    """How to draw, checked: a slip must not wait for a large model to be loaded."""
    from gptoss.backends.protocol import Sampling
    from gptoss.engine import uniform

    with usage():
        Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        uniform(seed or 0, 0)
    return {
        "temperature": temperature,
        "max_tokens": limit,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "seed": seed,
    }


def load(
    model: str,
    backend: str,
    dtype: str | None,
    device: str | None,
    context: int | None,
    *,
    force: bool,
    quiet: bool,
) -> LLM:
    """The model, after saying on stderr how it will be run."""
    from gptoss.llm import LLM

    def announce(plan: object) -> None:
        print(plan, file=sys.stderr, flush=True)

    with usage(), bar("loading") as progress:
        return LLM.load(
            model,
            backend,
            dtype,
            device,
            context,
            force=force,
            announce=None if quiet else announce,
            progress=progress,
        )
