"""``gptoss train``: from nothing or from a checkpoint, and back into the released format.

gptoss train lint nano chats.jsonl
gptoss train preview nano chats.jsonl --lines 2
gptoss train sft nano chats.jsonl --out runs/first --steps 300 --lr 1e-3
gptoss train sft openai/gpt-oss-20b chats.jsonl --out runs/lora --lora 8 --dtype bfloat16
gptoss train sft openai/gpt-oss-20b chats.jsonl --out runs/mac --lora 8 -b mlx --device gpu
gptoss train pretrain nano texts.jsonl --out runs/new --tokenizer words.json
torchrun --nproc-per-node 2 -m gptoss train sft nano chats.jsonl --out runs/two --accumulate 2
gptoss train grpo nano prompts.jsonl --out runs/reward --reward exact --steps 50 --lr 3e-4
gptoss train ppo nano prompts.jsonl --out runs/ppo --reward exact --reward 0.1*rewards.py:short
gptoss train export runs/first first --data held-out.jsonl
gptoss train convert sharegpt.json chats.jsonl --form sharegpt
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from gptoss.cli.arguments import Argument, Option, WrongCommandLine
from gptoss.cli.endings import usage
from gptoss.cli.terminal import bar, shown
from gptoss.cli.tracing import Stepping
from gptoss.errors import BackendUnavailable, GptOssError
from gptoss.train.config import Reading, TrainConfig, Tuning
from gptoss.train.objective import Grpo, Ppo, Rollouts
from gptoss.train.stop import Stopped

if TYPE_CHECKING:
    from gptoss.text.tokenizer import Tokenizer
    from gptoss.train.batch import Document
    from gptoss.train.corpus import Corpus

Watch = Callable[[dict[str, Any]], None]
Looked = Callable[[int, int], None]
Model = Annotated[str, Argument(help='"nano", a checkpoint\'s path, or a Hugging Face id')]
Data = Annotated[list[str], Argument(help="files of JSON lines")]
Out = Annotated[Path, Option(help="the run's directory; a run that is there goes on")]
Words = Annotated[
    Path | None, Option(help="a tokenizer.json", default="the model's own, or gpt-oss's")
]

Judged = Annotated[
    list[str],
    Option(help="exact, format, brief, module:function or file.py:function; 0.1*NAME weighs it"),
]


def run(
    recipe: Annotated[
        Literal["sft", "pretrain", "grpo", "ppo", "preview", "lint", "export", "convert"],
        Argument(help="`gptoss train RECIPE --help` says what each takes"),
    ],
) -> None:
    """Train a model: sft, pretrain, grpo, ppo; look at data: preview, lint, convert; and export."""
    raise AssertionError("the recipe is chosen first")


def recipe(name: str) -> Callable[..., None]:
    """What ``gptoss train NAME`` runs. Raises WrongCommandLine, and says where torch is missing."""
    known = (sft, pretrain, grpo, ppo, preview, lint, export, convert)
    recipes = {one.__name__: one for one in known}
    if name not in recipes:
        raise WrongCommandLine(f"there is no recipe {name!r}, only {', '.join(recipes)}")
    return recipes[name]


def sft(
    model: Model,
    data: Data,
    out: Out,
    backend: Annotated[
        Literal["torch", "mlx"], Option("-b", "--backend", help="what computes; mlx: adapters only")
    ] = "torch",
    *,
    config: TrainConfig,
    reading: Reading,
    tuning: Tuning,
    tracing: Stepping,
) -> None:
    """Train a checkpoint on conversations: all of it, adapters only (--lora), or for MXFP4 (--qat).

    The same command goes on where an earlier one was stopped.
    """
    if backend == "mlx":
        if tracing.trace is not None:
            raise WrongCommandLine("--trace is torch's: MLX keeps nothing of a step")
        with torch_needed():
            from gptoss.train import mlx
        with training(config, out) as (looked, watch):
            mlx.sft(
                *(model, data, out),
                config=config,
                reading=reading,
                tuning=tuning,
                watch=watch,
                looked=looked,
            )
        return
    with torch_needed():
        from gptoss.train import recipes
    with training(config, out) as (looked, watch), alone(tracing).observer(model) as observe:
        recipes.sft(
            model,
            data,
            out,
            config=config,
            reading=reading,
            tuning=tuning,
            watch=watch,
            looked=looked,
            observe=observe,
            announce=announce,
        )


def pretrain(
    model: Annotated[str, Argument(help="20b, 120b, nano, or the path of a config.json")],
    data: Data,
    out: Out,
    tokenizer: Words = None,
    *,
    config: TrainConfig,
    reading: Reading,
    tracing: Stepping,
) -> None:
    """Train a new model on texts or conversations.

    The same command goes on where an earlier one was stopped.
    """
    with torch_needed():
        from gptoss.train import recipes
    with training(config, out) as (looked, watch), alone(tracing).observer(model) as observe:
        recipes.pretrain(
            model,
            data,
            out,
            tokenizer=tokenizer,
            config=config,
            reading=reading,
            watch=watch,
            looked=looked,
            observe=observe,
            announce=announce,
        )


def grpo(
    model: Model,
    data: Data,
    out: Out,
    reward: Judged,
    *,
    config: TrainConfig,
    rollouts: Rollouts,
    objective: Grpo,
    tuning: Tuning,
    tracing: Stepping,
) -> None:
    """Train a checkpoint on rewards: an answer is held against others to the same prompt.

    The same command goes on where an earlier one was stopped.
    """
    with torch_needed():
        from gptoss.train import grpo as recipe
    with training(config, out) as (looked, watch), alone(tracing).observer(model) as observe:
        recipe.grpo(
            *(model, data, out, reward),
            config=config,
            rollouts=rollouts,
            objective=objective,
            tuning=tuning,
            watch=watch,
            looked=looked,
            observe=observe,
            announce=announce,
        )


def ppo(
    model: Model,
    data: Data,
    out: Out,
    reward: Judged,
    *,
    config: TrainConfig,
    rollouts: Rollouts,
    objective: Ppo,
    tuning: Tuning,
    tracing: Stepping,
) -> None:
    """Train a checkpoint on rewards: a token is held against what a value head expected.

    The same command goes on where an earlier one was stopped.
    """
    with torch_needed():
        from gptoss.train import ppo as recipe
    with training(config, out) as (looked, watch), alone(tracing).observer(model) as observe:
        recipe.ppo(
            *(model, data, out, reward),
            config=config,
            rollouts=rollouts,
            objective=objective,
            tuning=tuning,
            watch=watch,
            looked=looked,
            observe=observe,
            announce=announce,
        )


def preview(
    model: Model,
    data: Data,
    lines: Annotated[int, Option(min=1, help="how many")] = 1,
    tokenizer: Words = None,
    *,
    reading: Reading,
) -> None:
    """Show what the model reads, and what of it it learns to say.

    Learned text is green, all else dim; where there are no colours, it stands in brackets.
    """
    with usage():
        corpus, words = opened(model, tokenizer, data, reading)
    for index in range(min(lines, len(corpus))):
        for document in corpus.line(index):
            head = f"{document.origin}: {document.trained} of {len(document.tokens)} tokens learned"
            print(head, file=sys.stderr)
            print("".join(painted(document, words)))


def lint(model: Model, data: Data, tokenizer: Words = None, *, reading: Reading) -> None:
    """Read all the data: what they hold, or the first bad line."""
    with torch_needed():
        from gptoss.train import lint as reader
    with usage():
        corpus, _ = opened(model, tokenizer, data, reading)
    with bar("checking") as looked:
        print(reader.lint(corpus, looked))


def export(
    run: Annotated[Path, Argument(help="the run's directory")],
    target: Annotated[Path, Argument(help="the directory to make")],
    to: Annotated[
        Literal["original", "huggingface", "huggingface-bf16", "mlx"], Option(help="layout")
    ] = "huggingface",
    rule: Annotated[
        Literal["floor", "ceil", "least_squares"] | None,
        Option(help="how scales are chosen", default="the run's own, or least_squares"),
    ] = None,
    data: Annotated[
        list[str] | None, Option(help="JSON lines on which to measure the loss before and after")
    ] = None,
) -> None:
    """Write the model of a run as a checkpoint, and say what packing changed."""
    with torch_needed():
        from gptoss.train import export as exporter
    with usage(), bar("exporting", files=True) as progress:
        report = exporter.export(run, target, to, rule=rule, data=data or (), progress=progress)
    print(report)


def convert(
    source: Annotated[Path, Argument(help="JSON lines, or one JSON list")],
    target: Annotated[Path, Argument(help="the file of JSON lines to write")],
    form: Annotated[Literal["sharegpt", "openai"], Option(help="what the source is")],
) -> None:
    """Write other people's conversations as JSON lines for training."""
    from gptoss.train import foreign

    count = foreign.convert(source, target, form)
    print(f"{target}: {count} conversation{'s' * (count != 1)}", file=sys.stderr)


def opened(
    model: str, tokenizer: Path | None, data: list[str], reading: Reading
) -> tuple[Corpus, Tokenizer]:
    """The data as a recipe would read them, and the vocabulary."""
    with torch_needed():
        from gptoss.train import recipes
    words = None if tokenizer is None else str(tokenizer)
    asked = {"recipe": "sft", "model": model, "tokenizer": words}
    vocabulary, numbers = recipes.tokenizer_of(asked), recipes.numbers_of(asked)
    return recipes.corpus_of(data, vocabulary, reading, numbers.context_length), vocabulary


def alone(tracing: Stepping) -> Stepping:
    """Raises WrongCommandLine: several processes, which torchrun started, cannot share a trace."""
    if tracing.trace is not None and os.environ.get("WORLD_SIZE", "1") != "1":
        raise WrongCommandLine("--trace is for one process alone, not for those of torchrun")
    return tracing


def announce(plan: object) -> None:
    """On stderr, before the model is loaded."""
    print(plan, file=sys.stderr, flush=True)


def painted(document: Document, words: Tokenizer) -> Iterator[str]:
    """Stretches of text that are learned, or not, as a terminal shows them."""
    colours = sys.stdout.isatty()
    marks = {True: ("\x1b[32m", "\x1b[0m"), False: ("\x1b[2m", "\x1b[0m")}
    if not colours:
        marks = {True: ("⟦", "⟧"), False: ("", "")}
    follow = [*document.tokens[1:], -1]
    said = [(document.tokens[0], False)]
    for target, token in zip(document.targets, follow, strict=True):
        said.append((target, True) if target >= 0 else (token, False))
    stretch: list[int] = []
    for i, (token, learned) in enumerate(said):
        if token >= 0:
            stretch.append(token)
        if i + 1 == len(said) or said[i + 1][1] != learned:
            begin, end = marks[learned]
            yield f"{begin}{shown(words.decode(stretch), sys.stdout)}{end}"
            stretch = []


@contextmanager
def torch_needed() -> Iterator[None]:
    """A sentence where torch, or MLX, is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing not in ("torch", "mlx"):
            raise
        extra = "train" if missing == "torch" else "train,mlx"
        raise BackendUnavailable(
            f"training needs {missing}: `pip install 'gptoss[{extra}]'`"
        ) from None


@contextmanager
def training(config: TrainConfig, out: Path) -> Iterator[tuple[Looked | None, Watch | None]]:
    """Around a recipe: how far it is, what it may refuse, and what to do with what it made.

    Of the processes that torchrun started one speaks: the first, or the first that cannot go on.
    """
    first = os.environ.get("RANK", "0") == "0"
    try:
        with usage(), bars(config) if first else nullcontext((None, None)) as watched:
            yield watched
    except (GptOssError, WrongCommandLine, Stopped) as error:
        from gptoss.train import ranks

        stopped = 128 + error.number if isinstance(error, Stopped) else 0
        if not ranks.speaks(first):
            raise SystemExit(stopped or 1) from None
        if not stopped:
            raise
        print(f"gptoss: {error}", file=sys.stderr)
        raise SystemExit(stopped) from None
    if first:
        said = f"{out}: trained; `gptoss train export {out} DIRECTORY` writes the model"
        print(said, file=sys.stderr)


@contextmanager
def bars(config: TrainConfig) -> Iterator[tuple[Looked | None, Watch | None]]:
    """A bar for the data, then for the steps: loss, tokens a second, memory, time that is left.

    None where nobody looks.
    """
    if not sys.stderr.isatty():
        yield None, None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = [TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("checking data", total=None)

        def looked(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        def watch(row: dict[str, Any]) -> None:
            reward = f"reward {row['reward']:.3f}  " if "reward" in row else ""
            said = (
                f"step {row['step']}/{config.steps}  {reward}loss {row['loss']:.4f}  "
                f"{row['tokens_per_second']:,.0f} tokens/s  {row['memory'] / 1e9:.2f} GB"
            )
            if not begun:
                begun.append(progress.add_task(said, total=config.steps))
                progress.remove_task(task)
            progress.update(begun[0], completed=row["step"], description=said)

        begun: list[Any] = []
        yield looked, watch
