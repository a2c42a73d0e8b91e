"""The same as pictures, for papers: surprise, the lens, sinks, routing. Needs matplotlib."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gptoss.checkpoint.staged import staged_file
from gptoss.errors import BackendUnavailable
from gptoss.model.reference import NDArray
from gptoss.sight.look import Sight
from gptoss.sight.messages import Span, spans, written
from gptoss.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 200
NAMED = 120  # tokens whose words still fit under a picture


def need_matplotlib() -> None:
    """Raises BackendUnavailable where it is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise BackendUnavailable(
            "plots need matplotlib, which is not installed; pip install 'gptoss[plots]'"
        )


def plots(sight: Sight, tokenizer: Tokenizer, folder: Path) -> Iterator[Path]:
    """Write each plot into ``folder``, made if it is not there, and tell its path."""
    need_matplotlib()
    folder.mkdir(parents=True, exist_ok=True)
    said = spans(sight.tokens, tokenizer)
    words = [_word(int(token), tokenizer) for token in sight.tokens]
    for name, figure in (
        ("surprise", _surprise(sight, said, words)),
        ("lens", _lens(sight, words)),
        ("sinks", _sinks(sight)),
        ("routing", _routing(sight, said)),
    ):
        path = folder / f"{name}.png"
        with staged_file(path) as file:
            figure.savefig(file, dpi=DPI, format="png", bbox_inches="tight")
        yield path


def _surprise(sight: Sight, said: list[Span], words: list[str]) -> Figure:
    """Bits of each token, a colour for each channel."""
    figure, [axes] = _figure(_width(words), 2.5)
    bits = np.concatenate([[0.0], -sight.expected.came[:-1] / np.log(2)])
    for i, label in enumerate(dict.fromkeys(span.label for span in said)):
        here = [t for s in said if s.label == label for t in range(s.start, s.stop)]
        axes.bar(here, bits[here], width=1.0, color=f"C{i}", label=label)
    axes.set(ylabel="surprise (bits)", xlim=(-0.5, len(words) - 0.5))
    axes.legend(frameon=False, fontsize=7, ncols=6, loc="lower left", bbox_to_anchor=(0, 1))
    _name(axes, words)
    return figure


def _lens(sight: Sight, words: list[str]) -> Figure:
    """How likely each layer's residual found the token that came."""
    figure, [axes] = _figure(_width(words), 0.6 + 0.18 * len(sight.lens))
    came = np.exp(np.stack([layer.came[:-1] for layer in sight.lens]))  # [layers, T - 1]
    _heat(figure, axes, came, "probability of what came", "token", "layer", first=1)
    _name(axes, words)
    return figure


def _sinks(sight: Sight) -> Figure:
    """The sink's share, in the mean over the conversation."""
    mean = np.stack([layer.sink.mean(axis=0) for layer in sight.attention])  # [layers, H]
    figure, [axes] = _figure(1.5 + 0.12 * mean.shape[1], 1 + 0.15 * len(mean))
    _heat(figure, axes, mean, "share of the sink", "head", "layer")
    return figure


def _routing(sight: Sight, said: list[Span]) -> Figure:
    """Each expert's share in each layer, for each channel."""
    labels = list(dict.fromkeys(span.label for span in said))
    wide, high = 1.5 + 0.12 * sight.config.num_experts, 0.8 + 0.13 * len(sight.lens)
    figure, all_axes = _figure(wide, (high + 0.4) * len(labels), len(labels))
    for axes, label in zip(all_axes, labels, strict=True):
        here = [t for s in said if s.label == label for t in range(s.start, s.stop)]
        axes.set_title(label, fontsize=8)
        _heat(figure, axes, routed(sight, here), "share", "expert", "layer")
    return figure


def routed(sight: Sight, tokens: list[int]) -> NDArray:
    """[layers, E]: what each expert had of these tokens; each layer's shares sum to one."""
    layers = sight.chosen.shape[1]
    shares = np.zeros((layers, sight.config.num_experts))
    for layer in range(layers):
        np.add.at(shares[layer], sight.chosen[tokens, layer], sight.share[tokens, layer])
    return shares / len(tokens)


def _figure(wide: float, high: float, count: int = 1) -> tuple[Figure, list[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(wide, high), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(count, 1, i + 1) for i in range(count)]


def _heat(
    figure: Figure, axes: Axes, x: NDArray, what: str, across: str, down: str, first: int = 0
) -> None:
    """``x`` [rows, columns] as colours; columns count from ``first``."""
    rows, columns = x.shape
    extent = (first - 0.5, first + columns - 0.5, rows - 0.5, -0.5)
    image = axes.imshow(x, aspect="auto", vmin=0, interpolation="nearest", extent=extent)
    axes.set(xlabel=across, ylabel=down)
    figure.colorbar(image, ax=axes, label=what, pad=0.01)


def _name(axes: Axes, words: list[str]) -> None:
    """Words under the columns, where there is room for them."""
    if len(words) > NAMED:
        axes.set_xlabel("token")
        return
    axes.set_xticks(range(len(words)), words, rotation=90, fontsize=5, family="monospace")
    axes.set_xlabel("")


def _width(words: list[str]) -> float:
    return min(14.0, 2 + 0.11 * len(words))


def _word(token: int, tokenizer: Tokenizer) -> str:
    """A token's text as one line; no dollar, which would begin mathematics."""
    _, text = written(token, tokenizer)
    return text.replace("\n", "\\n").replace("\t", "\\t").replace("$", r"\$")
