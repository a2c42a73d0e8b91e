"""``gptoss synthesize``: a random checkpoint of any size, for tests and benchmarks.

gptoss synthesize 20b /tmp/20b-random --layers 2
gptoss synthesize nano /tmp/tiny --layout original --seed 7
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from gptoss.cli import options
from gptoss.cli.arguments import Argument, Option, WrongCommandLine
from gptoss.cli.terminal import bar


def run(
    preset: Annotated[Literal["20b", "120b", "nano"], Argument(help="whose shapes")],
    target: Annotated[Path, Argument(help="the directory to make")],
    layout: Annotated[
        Literal["original", "huggingface", "huggingface-bf16", "mlx"], Option(help="layout")
    ] = "huggingface",
    seed: options.Seed = 0,
    layers: Annotated[
        int | None, Option(min=1, max=4096, help="layers, if not the preset's")
    ] = None,
    tokenizer: Annotated[Path | None, Option(help="a tokenizer.json to copy")] = None,
) -> None:
    """Write random weights that behave well. They appear whole, or not at all."""
    from gptoss.checkpoint.synthesize import synthesize
    from gptoss.model.config import PRESETS

    if tokenizer is not None and not tokenizer.is_file():
        raise WrongCommandLine(f"--tokenizer: {tokenizer} is no file")
    config = PRESETS[preset]()
    if layers is not None:
        config = replace(config, num_hidden_layers=layers)
    with bar("writing", files=True) as progress:
        written = synthesize(
            config, target, layout, seed=seed or 0, tokenizer_path=tokenizer, progress=progress
        )
    print(f"{written}: {layout} layout", file=sys.stderr)
