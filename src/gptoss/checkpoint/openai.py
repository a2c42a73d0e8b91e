"""The original layout: canonical names, experts as ``.blocks`` and ``.scales``."""

from gptoss.checkpoint.layout import Entry, Layout
from gptoss.model.config import ModelConfig
from gptoss.model.mxfp4 import BLOCK
from gptoss.model.weights import specs


def entries(config: ModelConfig) -> list[Entry]:
    """Every tensor of the original layout."""
    table = []
    for spec in specs(config):
        if spec.kind == "dense":
            table.append(Entry(spec.name, spec.shape, spec.name, "whole"))
        else:
            scales = (*spec.shape[:-1], spec.shape[-1] // BLOCK)
            table.append(Entry(f"{spec.name}.blocks", (*scales, BLOCK // 2), spec.name, "blocks"))
            table.append(Entry(f"{spec.name}.scales", scales, spec.name, "scales"))
    return table


ORIGINAL = Layout("original", packed=True, entries=entries)
