"""``gptoss convert``: the same weights in another layout.

gptoss convert checkpoints/20b/original checkpoints/20b-hf --to huggingface
gptoss convert openai/gpt-oss-20b 20b-bf16 --to huggingface-bf16
"""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from gptoss.cli.terminal import bar


def run(
    source: Annotated[str, typer.Argument(help="a checkpoint's path, or a Hugging Face id")],
    target: Annotated[Path, typer.Argument(help="the directory to make")],
    to: Annotated[
        Literal["original", "huggingface", "huggingface-bf16"], typer.Option(help="layout")
    ],
) -> None:
    """Write a checkpoint in another layout. It appears whole, or not at all."""
    from gptoss.checkpoint.save import convert
    from gptoss.llm.models import resolve

    with bar("converting", files=True) as progress:
        written = convert(resolve(source), target, to, progress=progress)
    print(f"{written}: {to} layout", file=sys.stderr)
