"""``gptoss convert``: the same weights in another layout.

gptoss convert checkpoints/20b/original checkpoints/20b-hf --to huggingface
gptoss convert openai/gpt-oss-20b 20b-bf16 --to huggingface-bf16
gptoss convert openai/gpt-oss-20b 20b-mlx --to mlx
gptoss convert openai/gpt-oss-20b 20b.gguf --to gguf --dense q8_0
"""

import sys
from pathlib import Path
from typing import Annotated, Literal

from gptoss.cli.arguments import Argument, Option, WrongCommandLine
from gptoss.cli.endings import usage
from gptoss.cli.terminal import bar


def run(
    source: Annotated[str, Argument(help="a checkpoint's path, or a Hugging Face id")],
    target: Annotated[Path, Argument(help="the directory to make; of a GGUF, the file")],
    to: Annotated[
        Literal["original", "huggingface", "huggingface-bf16", "mlx", "gguf"],
        Option(help="layout"),
    ],
    dense: Annotated[
        Literal["bf16", "q8_0"] | None,
        Option(help="gguf: the matrices outside the experts", default="bf16"),
    ] = None,
) -> None:
    """Write a checkpoint in another layout. It appears whole, or not at all."""
    from gptoss.llm.models import resolve

    if dense is not None and to != "gguf":
        raise WrongCommandLine("--dense is for --to gguf only")
    with bar("converting", files=True) as progress:
        if to == "gguf":
            from gptoss.checkpoint.gguf import write_gguf

            with usage():
                written = write_gguf(
                    resolve(source), target, dense=dense or "bf16", progress=progress
                )
        else:
            from gptoss.checkpoint.save import convert

            written = convert(resolve(source), target, to, progress=progress)
    print(f"{written}: {to} layout", file=sys.stderr)
