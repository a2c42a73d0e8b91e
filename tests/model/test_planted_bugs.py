"""Every fact about gpt-oss, got wrong on purpose: stored traces of ``transformers`` must notice.

A bug is planted by rewriting one passage of the source that the reference runs. So each entry of
``FACTS`` is a passage, the trace point where a mistake in it must first show, and the mistakes. No
torch is needed, and each takes a fraction of a second.
"""

import inspect
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np
import pytest

from gptoss.backends import protocol
from gptoss.backends.reference import backend
from gptoss.model import config, model, mxfp4, reference
from tests.model.cases import (
    STORED,
    TOLERANCE,
    Golden,
    Trace,
    errors,
    first_divergence,
    golden,
    reference_trace,
)

FACTS: list[tuple[ModuleType, str, str, dict[str, str]]] = [
    (
        model,
        "x = ops.gather(w.embedding, tokens)",
        "embedding",
        {"embedding scaled as Gemma's": "x = ops.gather(w.embedding, tokens) * len(w.norm) ** 0.5"},
    ),
    (
        reference,
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
        model,
        "ops.linear(x, w.qkv, w.qkv_bias)",
        "block.0.attn.q",
        {"no qkv bias": "ops.linear(x, w.qkv, None)"},
    ),
    (
        model,
        "k = qkv[:, H * d : (H + K) * d]",
        "block.0.attn.k",
        {"keys read where values lie": "k = qkv[:, (H + K) * d :]"},
    ),
    (
        model,
        "v = qkv[:, (H + K) * d :]",
        "block.0.attn.v",
        {"values read where keys lie": "v = qkv[:, H * d : (H + K) * d]"},
    ),
    (
        model,
        "q, k = ops.rope(q, positions, config), ops.rope(k, positions, config)",
        "block.0.attn.k",
        {"keys not rotated": "q = ops.rope(q, positions, config)"},
    ),
    (
        reference,
        "[a * cos - b * sin, b * cos + a * sin]",
        "block.0.attn.q",
        {"rotated backwards": "[a * cos + b * sin, b * cos - a * sin]"},
    ),
    (
        reference,
        """a, b = np.split(x, 2, axis=-1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)""",
        "block.0.attn.q",
        {
            "neighbours paired": """a, b = x[..., ::2], x[..., 1::2]
        return np.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(x.shape)"""
        },
    ),
    (
        reference,
        "freq = config.rope_theta ** (",
        "block.0.attn.q",
        {"theta of Llama": "freq = 10_000.0 ** ("},
    ),
    (
        reference,
        "if config.rope_scaling_factor > 1.0:",
        "block.0.attn.q",
        {"no YaRN": "if False:"},
    ),
    (
        reference,
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
        reference,
        "low, high = config.yarn_range",
        "block.0.attn.q",
        {
            "YaRN range rounded": (
                "low, high = map(lambda f, x: f(x), (np.floor, np.ceil), config.yarn_range)"
            )
        },
    ),
    (
        config,
        "for turns in (self.rope_ntk_beta, self.rope_ntk_alpha)",
        "block.0.attn.q",
        {"beta fast and slow swapped": "for turns in (self.rope_ntk_alpha, self.rope_ntk_beta)"},
    ),
    (
        reference,
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
        reference,
        "angle = np.asarray(positions)[:, None, None] * freq",
        "block.0.attn.q",
        {"positions counted from one": "angle = (np.asarray(positions)[:, None, None] + 1) * freq"},
    ),
    (
        protocol,
        "self.past - self.starts[:-1], counts",
        "block.0.attn.q",
        {"positions restart in each chunk": "-self.starts[:-1], counts"},
    ),
    (
        backend,
        "np.concatenate([old_k, keys]), np.concatenate([old_v, values])",
        "block.0.attn.mixed",
        {"earlier chunks forgotten": "keys, values"},
    ),
    (
        backend,
        "enumerate(self.batch.slots.tolist())",
        "block.0.attn.mixed",
        {"rows share one past": "enumerate([0] * len(self.batch.slots))"},
    ),
    (
        reference,
        "np.repeat(k, H // K, axis=1), np.repeat(v, H // K, axis=1)",
        "block.0.attn.mixed",
        {"key heads tiled": "np.tile(k, (1, H // K, 1)), np.tile(v, (1, H // K, 1))"},
    ),
    (
        reference,
        "k, optimize=True) * d**-0.5",
        "block.0.attn.mixed",
        {
            "scores not scaled": "k, optimize=True)",
            "scores scaled by width": "k, optimize=True) * (H * d)**-0.5",
        },
    ),
    (
        reference,
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
        reference,
        "np.where(hidden, -np.inf, scores)",
        "block.0.attn.mixed",
        {
            "keys out of the window count as zero": (
                "np.where(age < 0, -np.inf, np.where(hidden, 0.0, scores))"
            )
        },
    ),
    (
        config,
        "return self.sliding_window if layer % 2 == 0 else None",
        "block.0.attn.mixed",
        {
            "odd layers slide": "return self.sliding_window if layer % 2 == 1 else None",
            "no layer slides": "return None",
        },
    ),
    (
        config,
        "return self.sliding_window if layer % 2 == 0 else None",
        "block.1.attn.mixed",
        {"every layer slides": "return self.sliding_window"},
    ),
    (
        reference,
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
        reference,
        "np.broadcast_to(sinks[:, None, None], (H, t, 1))",
        "block.0.attn.mixed",
        {
            "sink scaled like a score": "np.broadcast_to(sinks[:, None, None] / d**0.5, (H, t, 1))",
            "sink of zero": "np.zeros((H, t, 1), q.dtype)",
            "one sink for all heads": "np.full((H, t, 1), sinks[0])",
        },
    ),
    (
        model,
        "w.out, w.out_bias)",
        "block.0.attn.out",
        {"no out bias": "w.out, None)"},
    ),
    (
        model,
        "x = x + ops.reduce(attention(",
        "block.0.attn",
        {"no residual around attention": "x = ops.reduce(attention("},
    ),
    (
        model,
        """x = ops.rms_norm(x, w.norm, config.rms_norm_eps)  # [T, D]
    trace(f"{here}.norm", x)
    scores""",
        "block.0.mlp.norm",
        {"no norm before the experts": 'trace(f"{here}.norm", x)\n    scores'},
    ),
    (
        model,
        "ops.linear(x, w.gate, w.gate_bias)",
        "block.0.mlp.gate",
        {"no router bias": "ops.linear(x, w.gate, None)"},
    ),
    (
        reference,
        "np.argsort(-scores,",
        "block.0.mlp.chosen",
        {"worst experts chosen": "np.argsort(scores,"},
    ),
    (
        reference,
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
        reference,
        "gate, linear = x[..., ::2], x[..., 1::2]",
        "block.0.mlp.out",
        {
            "gate and up in halves": "gate, linear = np.split(x, 2, axis=-1)",
            "gate and up swapped": "linear, gate = x[..., ::2], x[..., 1::2]",
        },
    ),
    (
        reference,
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
        reference,
        "gate / (1.0 + np.exp(-1.702 * gate)) * (linear + 1.0)",
        "block.0.mlp.out",
        {
            "plain SiLU": "gate / (1.0 + np.exp(-gate)) * (linear + 1.0)",
            "no one added to up": "gate / (1.0 + np.exp(-1.702 * gate)) * linear",
            "no gate beside the sigmoid": "1.0 / (1.0 + np.exp(-1.702 * gate)) * (linear + 1.0)",
        },
    ),
    (
        reference,
        "x[t] @ mlp1.T + w.mlp1_bias[e]",
        "block.0.mlp.out",
        {"no mlp1 bias": "x[t] @ mlp1.T"},
    ),
    (
        reference,
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
        reference,
        "(each * share[..., None]).sum(axis=1)",
        "block.0.mlp.out",
        {"experts averaged": "each.mean(axis=1)"},
    ),
    (
        mxfp4,
        "PAIRS[blocks].reshape",
        "block.0.mlp.out",
        {
            "high nibble first": "PAIRS[blocks][..., ::-1].reshape",
            "nibbles in GGUF's order": "PAIRS[blocks].swapaxes(-1, -2).reshape",
        },
    ),
    (
        mxfp4,
        "exponent = scales.astype(np.int32) - BIAS",
        "block.0.mlp.out",
        {"scale counted from 128": "exponent = scales.astype(np.int32) - 128"},
    ),
    (
        model,
        "x = x + ops.reduce(mixture(",
        "block.0",
        {"no residual around the experts": "x = ops.reduce(mixture("},
    ),
    (
        model,
        "x = ops.rms_norm(ops.gather(x, wanted), w.norm, config.rms_norm_eps)",
        "norm",
        {"no final norm": "x = ops.gather(x, wanted)"},
    ),
    (
        model,
        "ops.linear(x, w.unembedding, None)",
        "logits",
        {"unembedding tied to the embedding": "ops.linear(x, w.embedding, None)"},
    ),
]
BUGS = {
    what: (module, right, wrong, first)
    for module, right, first, bugs in FACTS
    for what, wrong in bugs.items()
}


@pytest.fixture(scope="module")
def stored() -> dict[str, Golden]:
    """The traces of ``tests/golden``."""
    return {name: golden(name) for name in STORED}


def trace_of(case: Golden, pieces: int = 3) -> Trace:
    """The rows of a stored case, batched, in several steps each."""
    return reference_trace(case.config, case.weights, case.rows, pieces=pieces)


@pytest.mark.parametrize("pieces", [1, 2, 3, 9])
@pytest.mark.parametrize("name", STORED)
def test_without_a_bug_nothing_diverges(stored, name, pieces):
    found = errors(trace_of(stored[name], pieces), stored[name].trace)
    assert first_divergence(found, TOLERANCE / 10) is None, f"worst: {max(found.values()):.1e}"


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # some bugs overflow
@pytest.mark.parametrize("what", BUGS)
def test_bug_is_caught_where_it_was_planted(stored, monkeypatch, what):
    module, right, wrong, first = BUGS[what]
    plant(monkeypatch, module, right, wrong)
    found = {name: errors(trace_of(case), case.trace) for name, case in stored.items()}
    shown = {name: first_divergence(f) for name, f in found.items()}
    assert set(shown.values()) - {None} == {first}, f"{what}: first diverges at {shown}"
    assert max(f[first] for f in found.values()) > 10 * TOLERANCE  # nor is it a near miss


def plant(patch: Any, module: ModuleType, right: str, wrong: str) -> None:
    """Rewrite one passage of a module: the functions around it get the code of the new text."""
    source = inspect.getsource(module)
    assert source.count(right) == 1, f"{module.__name__} says {right!r} {source.count(right)} times"
    rewritten = compile(source.replace(right, wrong), module.__file__ or "", "exec")
    new = {code.co_qualname: code for code in codes(rewritten)}
    changed = 0
    for function in functions(module):
        code = new[function.__qualname__]
        if code != function.__code__:
            patch.setattr(function, "__code__", code)
            changed += 1
    assert changed, f"{wrong!r} in place of {right!r} changes no function of {module.__name__}"


def codes(code: CodeType) -> Iterator[CodeType]:
    """Every function compiled within, at any depth."""
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield inner
            yield from codes(inner)


def functions(module: ModuleType) -> Iterator[FunctionType]:
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


def test_the_stored_traces_are_of_the_cases_they_are_named_after(stored):
    for name, case in stored.items():
        assert case.config == STORED[name].config
        assert case.rows == STORED[name].tokens
        assert case.provenance["transformers"]
        for key, x in STORED[name].weights.items():
            mine = case.weights[key]
            if isinstance(x, mxfp4.Packed):
                assert np.array_equal(mine.blocks, x.blocks)
                assert np.array_equal(mine.scales, x.scales)
            else:
                assert np.array_equal(mine, x), key
