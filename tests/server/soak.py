"""Many mixed streams at a server for a while, some of which hang up: does it stay as it was?

    python -m tests.server.soak --streams 64 --seconds 300

Every kind of request is asked alone first. Then all at once, in any order; a fifth is dropped at a
random moment, the others must say what they said alone. At the end nothing may be left behind. The
server runs in this process, who asks it in another one. Ends with one JSON line.
"""

import argparse
import asyncio
import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import httpx2

from tests.server.conftest import ASKING, WEATHER, running

DROPPED = 0.2
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "mild": {"type": "boolean"}},
    "required": ["city", "mild"],
    "additionalProperties": False,
}
STRICT = WEATHER["function"] | {"strict": True, "parameters": CITY}
FORMAT = {"name": "city", "schema": CITY}
LONG = "Reverse the word planet. " * 60


def user(text):
    return [{"role": "user", "content": text}]


def kinds():
    """Path and body of each kind of request; all are greedy or have a seed."""
    sums = [f"What is {7 * i + 11} + {31 * i + 5}?" for i in range(8)]
    chats = [
        *({"messages": user(text), "temperature": 0} for text in sums),
        *({"messages": user(text), "seed": 3, "reasoning_effort": "high"} for text in sums[:3]),
        {"messages": user(sums[0]), "temperature": 2, "seed": 5, "n": 3, "max_tokens": 60},
        {"messages": user(sums[1]), "temperature": 0, "logprobs": True, "top_logprobs": 3},
        {"messages": user(sums[2]), "temperature": 0, "n": 2, "stop": ["=", "7"]},
        {"messages": user(LONG + sums[3]), "temperature": 0, "max_tokens": 40},
        {"messages": ASKING, "temperature": 0, "tools": [WEATHER]},
        {
            "messages": ASKING,
            "seed": 9,
            "tools": [{"type": "function", "function": STRICT}],
            "tool_choice": "required",
            "max_tokens": 200,
        },
        {
            "messages": ASKING,
            "seed": 1,
            "response_format": {"type": "json_schema", "json_schema": FORMAT},
            "max_tokens": 200,
        },
        {"messages": user("Hello!"), "seed": 2, "frequency_penalty": 0.5, "max_tokens": 80},
    ]
    answers = [
        *({"input": text, "temperature": 0, "store": i == 0} for i, text in enumerate(sums[4:])),
        {"input": ASKING, "temperature": 0, "tools": [{"type": "function", **STRICT}]},
        {
            "input": ASKING,
            "seed": 4,
            "text": {"format": {"type": "json_schema", **FORMAT}},
            "max_output_tokens": 200,
        },
        {"input": LONG, "temperature": 0, "max_output_tokens": 30, "store": False},
    ]
    raw = [
        {"prompt": sums[5], "temperature": 0, "max_tokens": 300, "ignore_eos": True},
        {"prompt": sums[:3], "seed": 6, "n": 2, "max_tokens": 50, "logprobs": 2, "echo": True},
        {"prompt": LONG, "temperature": 1.5, "seed": 8, "max_tokens": 150, "ignore_eos": True},
        {"prompt": [1, 2, 3], "seed": 7, "best_of": 4, "max_tokens": 30},
    ]
    bodies = {"/v1/chat/completions": chats, "/v1/responses": answers, "/v1/completions": raw}
    return [(path, body) for path, some in bodies.items() for body in some]


def told(path, lines, stream):
    """What an answer says, without its names and times; the same of a stream and a document."""
    if not stream:
        found = json.loads("".join(lines))
        return plain(found["output"] if "responses" in path else found["choices"])
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    if "responses" in path:
        return plain(json.loads(data[-1])["response"]["output"])
    assert data.pop() == "[DONE]", "cut off"
    return plain(joined([json.loads(each) for each in data]))


def joined(chunks):
    """The choices of a stream as a document has them."""
    choices = {}
    for piece in (choice for chunk in chunks for choice in chunk["choices"]):
        whole = choices.setdefault(piece["index"], {"index": piece["index"]})
        delta = piece.get("delta")
        if delta is None:
            merge(whole, {"text": piece["text"]})
        else:
            merge(whole.setdefault("message", {}), delta)
        if piece["logprobs"]:
            merge(whole.setdefault("logprobs", {}), piece["logprobs"])
        whole["finish_reason"] = piece["finish_reason"]
    return [choices[i] for i in sorted(choices)]


def merge(whole, more):
    for key, value in more.items():
        if key == "tool_calls":
            calls = whole.setdefault(key, [])
            for call in value:
                if call["index"] == len(calls):
                    calls.append({})
                merge(calls[call["index"]], {k: v for k, v in call.items() if k != "index"})
        elif isinstance(value, dict):
            merge(whole.setdefault(key, {}), value)
        elif isinstance(value, str | list) and key not in ("role", "type", "id"):
            whole[key] = whole[key] + value if whole.get(key) else value
        elif value is not None:
            whole[key] = value


def plain(value):
    """Without names, and without what is empty."""
    if isinstance(value, dict):
        kept = {k: plain(v) for k, v in value.items() if k not in ("id", "call_id", "role")}
        return {k: v for k, v in kept.items() if v not in (None, "", [], {})}
    return [plain(v) for v in value] if isinstance(value, list) else value


async def ask(client, path, body, stream):
    how = body | {"stream": True} if stream else body
    async with client.stream("POST", path, json=how) as response:
        lines = [line async for line in response.aiter_lines()]
        if response.status_code != 200:
            raise AssertionError(f"status {response.status_code}: {lines[0][:200]}")
    return told(path, lines, stream)


async def asking(base, streams_, seconds, requests, seed):
    """The other process: facts of what it was told."""
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(base_url=base, timeout=600, limits=limits) as client:
        asked = kinds()
        alone = [await ask(client, path, body, stream=False) for path, body in asked]
        print("alone", flush=True)
        facts, wrong, lasted = Counter(), [], [0.5] * len(asked)
        end = time.monotonic() + seconds
        draw = random.Random(seed)

        async def one():
            while time.monotonic() < end and facts["asked"] < requests:
                facts["asked"] += 1
                i = draw.randrange(len(asked))
                stream = draw.random() < 0.5 and "best_of" not in asked[i][1]
                drop = draw.random() < DROPPED
                begun = time.monotonic()
                try:
                    wait = draw.random() * lasted[i] if drop else None
                    async with asyncio.timeout(wait):
                        got = await ask(client, *asked[i], stream)
                    facts["answered"] += 1
                    lasted[i] = time.monotonic() - begun
                    if got != alone[i]:
                        wrong.append([asked[i], stream, alone[i], got])
                except TimeoutError:
                    facts["dropped"] += 1
                except (AssertionError, httpx2.HTTPError) as error:
                    facts[f"failed: {type(error).__name__} {str(error)[:150]}"] += 1

        await asyncio.gather(*(one() for _ in range(streams_)))
    return {**facts, "slowest_seconds": round(max(lasted), 2), "different": len(wrong)}, wrong[:3]


def left(server):
    """What is there although nobody asks for anything; all of it should be nothing."""
    engine = server.served.worker.engine
    known = {node.slot for node in engine.scheduler.prefixes.used}
    reserved = engine.scheduler.cache.reserved
    return {
        "sequences": server.busy,
        "slots": len(set(reserved) - known),
        "tokens": sum(reserved.values()) - engine.scheduler.prefixes.tokens,
        "deadlines": sum(s.finish is None for s in engine.deadlines),
        "requests": server.server.gate.inside,
        "responses": len(server.server.desk._jobs),
    }


def resident():
    """Megabytes of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def soak(streams_=64, seconds=300.0, requests=10**9, seed=0, waiting=1024):
    """Run it; the facts, and the first differences."""
    with running(waiting=waiting) as server:
        how = [server.base, streams_, seconds, requests, seed]
        command = [sys.executable, "-m", "tests.server.soak", "--asking", json.dumps(how)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
            assert other.stdout.readline() == "alone\n"
            sizes, begun = [resident()], time.monotonic()
            while other.poll() is None:
                time.sleep(min(1.0, seconds / 50))
                sizes.append(resident())
            facts, wrong = json.loads(other.stdout.read())
        took = time.monotonic() - begun
        end = time.monotonic() + 30
        while any(left(server).values()) and time.monotonic() < end:
            time.sleep(0.01)
        stats = server.served.worker.stats
        third = len(sizes) // 3
        return {
            "streams": streams_,
            "seconds": round(took, 1),
            **facts,
            "tokens": stats.completion,
            "preempted": stats.preempted,
            "left": left(server),
            "megabytes": [round(s, 1) for s in (sizes[0], sizes[third], sizes[-1])],
        }, wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--asking", type=json.loads, help="for the other process")
    given = parser.parse_args()
    if given.asking:
        print(json.dumps(asyncio.run(asking(*given.asking))))
        return
    facts, wrong = soak(given.streams, given.seconds, seed=given.seed)
    for each in wrong:
        print(*map(json.dumps, each), sep="\n", file=sys.stderr)
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
