"""What a model computes of a batch, shown to whoever wants to see it; training is the same.

    trainer.run(draw, observed(trainer, module, loss, observe))

``observe(step, batch)`` gives a ``model.Trace`` for a batch that is to be seen, or None. Behind the
values that ``model/model.py`` names, the trace is shown ``scored``: what the batch's tokens got.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from gptoss.model.model import Trace

B = TypeVar("B")
Observe = Callable[[int, Any], Trace | None]


def observed(
    steps: Any, model: nn.Module, loss: Callable[[B], Any], observe: Observe | None
) -> Callable[[B], Any]:
    """``loss`` of the ``model``, which shows what it computes; ``steps.step`` is where one is."""
    if observe is None:
        return loss

    def seen(minibatch: B) -> Any:
        batch = getattr(minibatch, "batch", minibatch)
        trace = None if batch is None else observe(steps.step, batch)
        if trace is None:
            return loss(minibatch)
        with shown(model, trace):
            return loss(minibatch)

    return seen


@contextmanager
def shown(model: nn.Module, trace: Trace) -> Iterator[None]:
    """Inside, ``trace`` sees what ``model`` computes, beside whoever it is called with."""

    def before(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        other = kwargs.get("trace")

        def both(name: str, x: Any) -> None:
            if other is not None:
                other(name, x)
            trace(name, x)

        return args, kwargs | {"trace": both}

    hooks = [
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(lambda module, args, output: trace("scored", output)),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
