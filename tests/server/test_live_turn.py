"""Whatever tokens a model draws, a turn tells them whole, in order, and without raising."""

import json
import random
from itertools import groupby
from types import SimpleNamespace

import jsonschema
import numpy as np
import pytest

from gptoss.engine import Drawn
from gptoss.grammar import JsonSchema, constrain
from gptoss.server.feed import Settings
from gptoss.server.legacy import Continuation
from gptoss.server.responses_output import Output
from gptoss.server.served import Thoughts
from gptoss.server.speech import Speech
from gptoss.server.sse import event
from gptoss.server.turn import Ask, Closed, Ended, Piece, Reader, Usage
from gptoss.text.messages import Tool
from gptoss.text.parser import Parser, Repair
from gptoss.text.tokenizer import Tokenizer
from tests.server.soak import CITY, joined, plain
from tests.server.test_responses_stream import grammar, said
from tests.text.conftest import NANO_SPECIALS
from tests.text.irregular import TOOLS
from tests.text.test_parser import as_bytes, streams

STOPS = ["o", "is", "ло", "😀", '":"', "\n", "to=", "Hello there", "\ufffd"]
PARTS = [slice(0, 300)] + [
    pytest.param(slice(i, i + 2_500), marks=pytest.mark.slow) for i in range(300, 20_300, 2_500)
]


@pytest.fixture(scope="module")
def o200k():
    return Tokenizer.o200k_harmony()


@pytest.fixture(scope="module")
def single():
    """A vocabulary of single bytes: every character beyond ASCII is cut."""
    specials = {name: 256 + i for i, name in enumerate(NANO_SPECIALS)}
    return Tokenizer({bytes([b]): b for b in range(256)}, specials)


def told(tokens, tokenizer, rng, stop=()):
    """The events of a live turn, after checking what all of them promise."""
    served = SimpleNamespace(tokenizer=tokenizer, thoughts=Thoughts(), name="m")
    reader = Reader(0, served, TOOLS, Ask(messages=[], settings=Settings(stop=stop)))
    drawn = [Drawn(t, -rng.random(), ((t, -1.0),)) for t in tokens]
    events = [e for d in drawn for e in reader.take(d)]
    events += reader.end(rng.choice(["length", "deadline"]))
    assert reader.end("stop") == reader.take(Drawn(65, None)) == [], "it speaks behind its end"
    assert [isinstance(e, Ended) for e in events] == [False] * (len(events) - 1) + [True]
    carried = [d for e in events if isinstance(e, Piece) for d in e.drawn]
    places = {id(d): i for i, d in enumerate(drawn)}
    order = [places[id(d)] for d in carried]
    assert order == sorted(set(order)), "a token is told twice, or too late"
    indices = []
    for index, some in groupby(events[:-1], lambda e: e.index):
        *pieces, closed = some
        indices.append(index)
        assert isinstance(closed, Closed) and all(isinstance(p, Piece) for p in pieces)
        assert "".join(p.text for p in pieces) == closed.message.content
        assert {p.call for p in pieces} <= {closed.call}
    assert indices == sorted(set(indices))
    spoken(events, served)
    listed(events, tokenizer)
    return events


def spoken(events, served):
    """The chunks of a chat's stream add up to its document."""
    whole, pieces = (Speech(served, 1, logprobs=True) for _ in range(2))
    for each in events:
        whole.take(each)
    chunks = [c for each in events for c in pieces.chunks(each)]
    assert all(event(c).endswith(b"}\n\n") for c in chunks)
    document = whole.whole(Usage(prompt=1, cached=0, completion=1, reasoning=0))
    assert plain(joined(chunks)) == plain(document["choices"])


def listed(events, tokenizer):
    """The events of a response are in order and add up to its items."""
    output = Output(tokenizer, logprobs=True, seal=True)
    inner = [e for each in events for e in output.take(each)] + list(output.close("incomplete"))
    response = {"id": "resp_x", "output": output.items}
    names = ["response.created", "response.in_progress", "response.completed"]
    first, second, last = ({"type": name, "response": response} for name in names)
    numbered = enumerate([first, second, *inner, last])
    assert grammar([e | {"sequence_number": i} for i, e in numbered])
    texts = [e.message.content for e in events if isinstance(e, Closed)]
    assert "".join(map(said, output.items)).replace("{}", "") == "".join(texts).replace("{}", "")


@pytest.mark.parametrize("part", PARTS)
def test_random_streams_lose_nothing(o200k, single, part):
    """Rendered conversations with tokens lost, doubled and swapped; noise; cut characters."""
    rng = random.Random(part.start)
    for i, (_, tokens) in enumerate(streams(part.stop - part.start, part.start, o200k, ["x"])):
        tokenizer = o200k
        if i % 4 == 0:
            tokens, tokenizer = as_bytes(tokens, o200k, single), single
        events = told(tokens, tokenizer, rng)
        end = next((i for i, t in enumerate(tokens, 1) if t in tokenizer.stop_tokens), len(tokens))
        ended = end < len(tokens) or bool(tokens and tokens[-1] in tokenizer.stop_tokens)
        parser = Parser(tokenizer, tools=TOOLS)
        for token in tokens[:end]:
            parser.push(token)
        parser.finish()
        contents = [e.message.content for e in events if isinstance(e, Closed)]
        messages = parser.messages
        headless = messages and Repair.NO_MESSAGE in messages[-1].repairs
        if headless and not ended and len(contents) < len(messages):
            messages = messages[:-1]  # a header that was cut
        assert contents == [m.content for m in messages]
        assert events[-1].reason in (("stop", "tool_calls") if ended else ("length", "deadline"))
        stops = rng.sample(STOPS, rng.randrange(1, 4))
        watched(events, told(tokens, tokenizer, rng, stops), stops)
        continued(tokens, tokenizer, rng, stops)


def watched(free, stopped, stops):
    """With stop strings a turn says the same, up to the first one in what is for the user."""
    for a, b in zip((e for e in free if isinstance(e, Closed)),
                    (e for e in stopped if isinstance(e, Closed)), strict=False):  # fmt: skip
        text, heard = a.message.content, a.call is None and a.message.channel != "analysis"
        ends = heard and [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
        assert b.message.content == text[: min(ends)[1] if ends else None]
        if ends:
            assert stopped[-1].reason in ("stop", "tool_calls")
            return
    assert [type(e) for e in free if isinstance(e, Closed)] == [
        type(e) for e in stopped if isinstance(e, Closed)
    ]


def continued(tokens, tokenizer, rng, stops):
    """The same tokens as a raw completion: their text, as UTF-8 up to its end or a stop string."""
    known = [t for t in tokens if t >= 0]
    row = Continuation(tokenizer, Settings(stop=stops, logprobs=1))
    fresh = [row.take(Drawn(t, -rng.random(), ((t, -1.0),))) for t in known]
    fresh.append(row.end("length"))
    end = next((i for i, t in enumerate(known) if t in tokenizer.stop_tokens), len(known))
    text = tokenizer.decode_bytes(known[:end]).decode("utf-8", "replace")
    ends = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
    assert "".join(f.text for f in fresh) == text[: min(ends)[1] if ends else None]
    assert sum(f.reason is not None for f in fresh) == 1
    for f in fresh:
        event(f.choice(0, tokenizer, logprobs=True))


LOOK = Tool(name="look", description="", parameters=CITY, strict=True)
WANTED = [
    {"format": JsonSchema(CITY)},
    {"tools": [LOOK], "choice": "required"},
    {"tools": [LOOK, Tool(name="nix", description="")], "choice": "functions.nix"},
    {"tools": [LOOK], "format": JsonSchema({"type": "integer"})},
]


@pytest.mark.parametrize("count", [10, pytest.param(250, marks=pytest.mark.slow)])
@pytest.mark.parametrize("wanted", WANTED)
def test_constrained_turns_hold_whatever_is_drawn(single, wanted, count):
    """Tokens are drawn at random from those that are allowed."""
    rng, whole = random.Random(count), 0
    first = constrain(single, **wanted)
    for _ in range(count):
        constraint, tokens = first.fork(), []
        while len(tokens) < 400 and not (tokens and tokens[-1] in single.stop_tokens):
            allowed = np.flatnonzero(constraint.mask()).tolist()
            closing = [t for t in allowed if t >= 256 or t in b'"}']
            tokens.append(rng.choice(closing if closing and rng.random() < 0.3 else allowed))
            constraint.accept(tokens[-1])
        *messages, _ = told(tokens, single, rng)
        if tokens[-1] in single.stop_tokens:
            last = messages[-1].message
            value = json.loads(last.content)
            if last.recipient == "functions.look" or len(wanted) == 1:
                jsonschema.validate(value, CITY)
            whole += 1
    assert whole, "none came to its end"
