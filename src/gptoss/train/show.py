"""Curves: TensorBoard's files and a picture, where their libraries are installed."""

import importlib.util
import logging
from pathlib import Path
from typing import Any

from gptoss.errors import BackendUnavailable

log = logging.getLogger("gptoss.train")
PLAIN = {"step", "seconds", "seen", "tokens", "memory"}  # not worth a curve


class Board:
    """TensorBoard's event files, if ``wanted``. Raises BackendUnavailable where it is missing."""

    def __init__(self, path: Path, wanted: bool) -> None:
        self.writer: Any = None
        if not wanted:
            return
        if importlib.util.find_spec("tensorboard") is None:
            raise BackendUnavailable("TensorBoard is not installed: `pip install 'gptoss[train]'`")
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(path / "tensorboard"))

    def add(self, row: dict[str, Any]) -> None:
        """A row of metrics."""
        for name, value in row.items() if self.writer else ():
            if name != "step":
                self.writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Write what waits."""
        if self.writer is not None:
            self.writer.close()


def curves(rows: list[dict[str, Any]], path: Path) -> None:
    """A picture with a curve for each metric; said, and none, where it cannot be drawn."""
    names = [n for n in dict.fromkeys(n for row in rows for n in row) if n not in PLAIN]
    if not names:
        return
    if importlib.util.find_spec("matplotlib") is None:
        log.info("%s is not drawn: matplotlib is not installed (`gptoss[train]`)", path)
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2.2 * -(-len(names) // 2)))
    FigureCanvasAgg(figure)
    figure.subplots_adjust(hspace=0.5)
    for i, name in enumerate(names):
        axes = figure.add_subplot(-(-len(names) // 2), 2, i + 1, title=name)
        points = [(row["step"], row[name]) for row in rows if name in row]
        axes.plot(*zip(*points, strict=True), linewidth=0.8)
    partial = path.with_name(".curves.png")
    try:
        figure.savefig(partial, dpi=100, format="png")
        partial.replace(path)
    except OSError as error:  # a full disk: no picture is worth a run
        log.warning("%s is not drawn: %s", path, error.strerror)
        partial.unlink(missing_ok=True)
