"""Every fact about gpt-oss, got wrong on purpose: what a planted bug would make of the reference.

A bug is planted by rewriting one passage of the source that the reference runs. So each entry of
``FACTS`` is a passage, the trace point where a mistake in it must first show, and the mistakes by
what they are called. One list serves the tests, which want each to be caught where it is, and
``gptoss verify --kit``, which asks of any engine whether it behaves as if it had one.
"""

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType, FunctionType, ModuleType

MODULES = {
    "config": "gptoss.model.config",
    "model": "gptoss.model.model",
    "mxfp4": "gptoss.model.mxfp4",
    "reference": "gptoss.model.reference",
    "protocol": "gptoss.backends.protocol",
    "backend": "gptoss.backends.reference.backend",
}
FACTS: list[tuple[str, str, str, dict[str, str]]] = [
    (
        "model",
        "x = ops.gather(w.embedding, tokens)",
        "embedding",
        {"embedding scaled as Gemma's": "x = ops.gather(w.embedding, tokens) * len(w.norm) ** 0.5"},
    ),
    (
        "reference",
        "x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * scale",
        "block.0.attn.norm",
        {
            "no epsilon": "x / np.sqrt(np.mean(x * x, -1, keepdims=True)) * scale",
            "epsilon outside the root": (
                "x / (np.sqrt(np.mean(x * x, -1, keepdims=True)) + eps) * scale"
            ),
            "sum in place of mean": "x / np.sqrt(np.sum(x * x, -1, keepdims=True) + eps) * scale",
            "the mean taken off": "x / np.sqrt(np.var(x, -1, keepdims=True) + eps) * scale",
            "scale counted from one": (
                "x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps) * (1.0 + scale)"
            ),
        },
    ),
    (
        "model",
        "ops.linear(x, w.qkv, w.qkv_bias)",
        "block.0.attn.q",
        {"no qkv bias": "ops.linear(x, w.qkv, None)"},
    ),
    (
        "model",
        "k = qkv[:, H * d : (H + K) * d]",
        "block.0.attn.k",
        {"keys read where values lie": "k = qkv[:, (H + K) * d :]"},
    ),
    (
        "model",
        "v = qkv[:, (H + K) * d :]",
        "block.0.attn.v",
        {"values read where keys lie": "v = qkv[:, H * d : (H + K) * d]"},
    ),
    (
        "model",
        "q, k = ops.rope(q, positions, config), ops.rope(k, positions, config)",
        "block.0.attn.k",
        {"keys not rotated": "q = ops.rope(q, positions, config)"},
    ),
    (
        "reference",
        "[a * cos - b * sin, b * cos + a * sin]",
        "block.0.attn.q",
        {"rotated backwards": "[a * cos + b * sin, b * cos - a * sin]"},
    ),
    (
        "reference",
        """a, b = np.split(x, 2, axis=-1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)""",
        "block.0.attn.q",
        {
            "neighbours paired": """a, b = x[..., ::2], x[..., 1::2]
        return np.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(x.shape)"""
        },
    ),
    (
        "reference",
        "freq = config.rope_theta ** (",
        "block.0.attn.q",
        {"theta of Llama": "freq = 10_000.0 ** ("},
    ),
    (
        "reference",
        "if config.rope_scaling_factor > 1.0:",
        "block.0.attn.q",
        {"no YaRN": "if False:"},
    ),
    (
        "reference",
        "concentration = 0.1 * np.log(config.rope_scaling_factor) + 1.0",
        "block.0.attn.q",
        {
            "no concentration": "concentration = 1.0",
            "concentration squared": (
                "concentration = (0.1 * np.log(config.rope_scaling_factor) + 1.0) ** 2"
            ),
        },
    ),
    (
        "reference",
        "low, high = config.yarn_range",
        "block.0.attn.q",
        {
            "YaRN range rounded": (
                "low, high = map(lambda f, x: f(x), (np.floor, np.ceil), config.yarn_range)"
            )
        },
    ),
    (
        "config",
        "for turns in (self.rope_ntk_beta, self.rope_ntk_alpha)",
        "block.0.attn.q",
        {"beta fast and slow swapped": "for turns in (self.rope_ntk_alpha, self.rope_ntk_beta)"},
    ),
    (
        "reference",
        "freq = freq * (1.0 - ramp) + freq / config.rope_scaling_factor * ramp",
        "block.0.attn.q",
        {
            "ramp upside down": (
                "freq = freq * ramp + freq / config.rope_scaling_factor * (1.0 - ramp)"
            ),
            "every frequency stretched": "freq = freq / config.rope_scaling_factor",
        },
    ),
    (
        "reference",
        "angle = np.asarray(positions)[:, None, None] * freq",
        "block.0.attn.q",
        {"positions counted from one": "angle = (np.asarray(positions)[:, None, None] + 1) * freq"},
    ),
    (
        "protocol",
        "self.past - self.starts[:-1], counts",
        "block.0.attn.q",
        {"positions restart in each chunk": "-self.starts[:-1], counts"},
    ),
    (
        "backend",
        "np.concatenate([old_k, keys]), np.concatenate([old_v, values])",
        "block.0.attn.mixed",
        {"earlier chunks forgotten": "keys, values"},
    ),
    (
        "backend",
        "enumerate(self.batch.slots.tolist())",
        "block.0.attn.mixed",
        {"rows share one past": "enumerate([0] * len(self.batch.slots))"},
    ),
    (
        "reference",
        "np.repeat(k, H // K, axis=1), np.repeat(v, H // K, axis=1)",
        "block.0.attn.mixed",
        {"key heads tiled": "np.tile(k, (1, H // K, 1)), np.tile(v, (1, H // K, 1))"},
    ),
    (
        "reference",
        "k, optimize=True) * d**-0.5",
        "block.0.attn.mixed",
        {
            "scores not scaled": "k, optimize=True)",
            "scores scaled by width": "k, optimize=True) * (H * d)**-0.5",
        },
    ),
    (
        "reference",
        "hidden = age < 0 if window is None else (age < 0) | (age >= window)",
        "block.0.attn.mixed",
        {
            "the next token visible": (
                "hidden = age < -1 if window is None else (age < -1) | (age >= window)"
            ),
            "the token itself hidden": (
                "hidden = age <= 0 if window is None else (age <= 0) | (age >= window)"
            ),
            "window of one key more": (
                "hidden = age < 0 if window is None else (age < 0) | (age > window)"
            ),
            "window of one key less": (
                "hidden = age < 0 if window is None else (age < 0) | (age >= window - 1)"
            ),
        },
    ),
    (
        "reference",
        "np.where(hidden, -np.inf, scores)",
        "block.0.attn.mixed",
        {
            "keys out of the window count as zero": (
                "np.where(age < 0, -np.inf, np.where(hidden, 0.0, scores))"
            )
        },
    ),
    (
        "config",
        "return self.sliding_window if layer % 2 == 0 else None",
        "block.0.attn.mixed",
        {
            "odd layers slide": "return self.sliding_window if layer % 2 == 1 else None",
            "no layer slides": "return None",
        },
    ),
    (
        "config",
        "return self.sliding_window if layer % 2 == 0 else None",
        "block.1.attn.mixed",
        {"every layer slides": "return self.sliding_window"},
    ),
    (
        "reference",
        "softmax(np.concatenate([scores, sink], axis=-1))[..., :-1]",
        "block.0.attn.mixed",
        {
            "no sink": "softmax(scores)",
            "shares with the sink's sum to one again": (
                "(lambda s: s / s.sum(-1, keepdims=True))"
                "(softmax(np.concatenate([scores, sink], axis=-1))[..., :-1])"
            ),
            "sink dropped from the front": (
                "softmax(np.concatenate([scores, sink], axis=-1))[..., 1:]"
            ),
        },
    ),
    (
        "reference",
        "np.broadcast_to(sinks[:, None, None], (H, t, 1))",
        "block.0.attn.mixed",
        {
            "sink scaled like a score": "np.broadcast_to(sinks[:, None, None] / d**0.5, (H, t, 1))",
            "sink of zero": "np.zeros((H, t, 1), q.dtype)",
            "one sink for all heads": "np.full((H, t, 1), sinks[0])",
        },
    ),
    (
        "model",
        "w.out, w.out_bias)",
        "block.0.attn.out",
        {"no out bias": "w.out, None)"},
    ),
    (
        "model",
        "x = x + ops.reduce(attention(",
        "block.0.attn",
        {"no residual around attention": "x = ops.reduce(attention("},
    ),
    (
        "model",
        """x = ops.rms_norm(x, w.norm, config.rms_norm_eps)  # [T, D]
    trace(f"{here}.norm", x)
    scores""",
        "block.0.mlp.norm",
        {"no norm before the experts": 'trace(f"{here}.norm", x)\n    scores'},
    ),
    (
        "model",
        "ops.linear(x, w.gate, w.gate_bias)",
        "block.0.mlp.gate",
        {"no router bias": "ops.linear(x, w.gate, None)"},
    ),
    (
        "reference",
        "np.argsort(-scores,",
        "block.0.mlp.chosen",
        {"worst experts chosen": "np.argsort(scores,"},
    ),
    (
        "reference",
        "softmax(np.take_along_axis(scores, chosen, axis=-1))",
        "block.0.mlp.share",
        {
            "softmax before top-k": "np.take_along_axis(softmax(scores), chosen, axis=-1)",
            "sigmoid in place of softmax": (
                "1.0 / (1.0 + np.exp(-np.take_along_axis(scores, chosen, axis=-1)))"
            ),
        },
    ),
    (
        "reference",
        "gate, linear = x[..., ::2], x[..., 1::2]",
        "block.0.mlp.out",
        {
            "gate and up in halves": "gate, linear = np.split(x, 2, axis=-1)",
            "gate and up swapped": "linear, gate = x[..., ::2], x[..., 1::2]",
        },
    ),
    (
        "reference",
        "np.minimum(gate, limit), np.clip(linear, -limit, limit)",
        "block.0.mlp.out",
        {
            "no clamp": "gate, linear",
            "gate clamped from below too": (
                "np.clip(gate, -limit, limit), np.clip(linear, -limit, limit)"
            ),
            "gate not clamped": "gate, np.clip(linear, -limit, limit)",
            "up clamped from above only": "np.minimum(gate, limit), np.minimum(linear, limit)",
            "up clamped after its one is added": (
                "np.minimum(gate, limit), np.clip(linear + 1.0, -limit, limit) - 1.0"
            ),
        },
    ),
    (
        "reference",
        "gate / (1.0 + np.exp(-1.702 * gate)) * (linear + 1.0)",
        "block.0.mlp.out",
        {
            "plain SiLU": "gate / (1.0 + np.exp(-gate)) * (linear + 1.0)",
            "no one added to up": "gate / (1.0 + np.exp(-1.702 * gate)) * linear",
            "no gate beside the sigmoid": "1.0 / (1.0 + np.exp(-1.702 * gate)) * (linear + 1.0)",
        },
    ),
    (
        "reference",
        "x[t] @ mlp1.T + w.mlp1_bias[e]",
        "block.0.mlp.out",
        {"no mlp1 bias": "x[t] @ mlp1.T"},
    ),
    (
        "reference",
        "hidden @ mlp2.T + w.mlp2_bias[e]",
        "block.0.mlp.out",
        {
            "no mlp2 bias": "hidden @ mlp2.T",
            "share applied before the mlp2 bias": (
                "hidden @ mlp2.T + w.mlp2_bias[e] / share[t, i][:, None]"
            ),
        },
    ),
    (
        "reference",
        "(each * share[..., None]).sum(axis=1)",
        "block.0.mlp.out",
        {"experts averaged": "each.mean(axis=1)"},
    ),
    (
        "mxfp4",
        "PAIRS[blocks].reshape",
        "block.0.mlp.out",
        {
            "high nibble first": "PAIRS[blocks][..., ::-1].reshape",
            "nibbles in GGUF's order": "PAIRS[blocks].swapaxes(-1, -2).reshape",
        },
    ),
    (
        "mxfp4",
        "exponent = scales.astype(np.int32) - BIAS",
        "block.0.mlp.out",
        {"scale counted from 128": "exponent = scales.astype(np.int32) - 128"},
    ),
    (
        "model",
        "x = x + ops.reduce(mixture(",
        "block.0",
        {"no residual around the experts": "x = ops.reduce(mixture("},
    ),
    (
        "model",
        "x = ops.rms_norm(x, w.norm, config.rms_norm_eps)  # [W, D]",
        "norm",
        {"no final norm": "pass"},
    ),
    (
        "model",
        "ops.linear(x, w.unembedding, None)",
        "logits",
        {"unembedding tied to the embedding": "ops.linear(x, w.embedding, None)"},
    ),
]


@dataclass(frozen=True, slots=True)
class Bug:
    """One mistake."""

    name: str  # what is wrong, in a few words
    module: str  # whose passage it is
    right: str  # the passage
    wrong: str  # what stands in its place
    first: str  # the trace point where it first shows


BUGS = {
    name: Bug(name, module, right, wrong, first)
    for module, right, first, bugs in FACTS
    for name, wrong in bugs.items()
}


@contextmanager
def planted(*names: str) -> Iterator[None]:
    """The reference has these bugs for a while, in every thread of this process.

    Raises:
        ValueError: there is no bug of that name, or two of them change the same passage.
    """
    from gptoss.backends.reference import backend  # noqa: F401  (so that it is there to rewrite)

    old: dict[FunctionType, CodeType] = {}
    try:
        for short, full in MODULES.items():
            mine = [_known(name) for name in names if _known(name).module == short]
            for function, code in _rewritten(sys.modules[full], mine) if mine else ():
                old[function], function.__code__ = function.__code__, code
        yield
    finally:
        for function, code in old.items():
            function.__code__ = code


def _known(name: str) -> Bug:
    if name not in BUGS:
        raise ValueError(f"there is no bug called {name!r}")
    return BUGS[name]


def _rewritten(module: ModuleType, bugs: list[Bug]) -> list[tuple[FunctionType, CodeType]]:
    """The functions around the passages, with the code of the rewritten source."""
    source = inspect.getsource(module)
    for bug in bugs:
        if source.count(bug.right) != 1:
            raise ValueError(f"{bug.name!r} does not go with the source of {module.__name__}")
        source = source.replace(bug.right, bug.wrong)
    rewritten = compile(source, module.__file__ or "", "exec")
    new = {code.co_qualname: code for code in _codes(rewritten)}
    pairs = [(f, new[f.__qualname__]) for f in _functions(module)]
    changed = [(f, code) for f, code in pairs if code != f.__code__]
    assert changed, f"{[bug.wrong for bug in bugs]} change nothing in {module.__name__}"
    return changed


def _codes(code: CodeType) -> Iterator[CodeType]:
    """Every function compiled within, at any depth."""
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield inner
            yield from _codes(inner)


def _functions(module: ModuleType) -> Iterator[FunctionType]:
    """The module's own functions, methods and properties."""
    mine = [x for x in vars(module).values() if getattr(x, "__module__", "") == module.__name__]
    for x in mine:
        for member in vars(x).values() if isinstance(x, type) else [x]:
            function = getattr(member, "fget", getattr(member, "__func__", member))
            if (
                isinstance(function, FunctionType)
                and function.__code__.co_filename == module.__file__
            ):
                yield function
