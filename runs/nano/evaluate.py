"""Exact answers of a nano checkpoint on held-out problems, as a user would get them.

    python -m runs.nano.evaluate nano --count 40

Greedy. Right is the final message that was taught, to the letter; of a tool problem, the call (name
and arguments) and the message after the tool's result. Prints a table, ends with one JSON line.
"""

import argparse
import json
import random
from collections import defaultdict

from gptoss import LLM
from runs.nano import tasks, vocabulary


def solve(llm: LLM, example: tasks.Example) -> tuple[bool, int]:
    """(is the answer right, characters of analysis)."""
    messages = list(example.prompt)
    thought = 0
    calls = [m for m in example.turn if m.role == "tool"]
    for _ in range(len(calls) + 1):
        reply = llm.chat(messages, temperature=0.0, max_tokens=600)
        thought += len(reply.analysis)
        messages += reply.messages
        if not reply.tool_calls:
            return reply.text == example.turn[-1].content and not calls, thought
        if not calls:
            return False, thought
        want = next(m for m in example.turn if m.recipient and m.role == "assistant")
        got = reply.tool_calls[0]
        if (got.recipient, got.content) != (want.recipient, want.content):
            return False, thought
        messages.append(calls.pop())
    return False, thought


def examine(llm: LLM, count: int, seed: int = 0) -> dict[str, dict[str, float]]:
    """{task: {effort: share right, "characters-effort": mean length of the analysis}}."""
    tasks.KNOWN[:] = vocabulary.known(llm.tokenizer)
    rng = random.Random(f"exam {seed}")
    marks: dict[str, dict[str, float]] = defaultdict(dict)
    for task in tasks.SHARES:
        for effort in tasks.EFFORTS:
            drawn = [tasks.example(rng, task=task, effort=effort, exam=True) for _ in range(count)]
            results = [solve(llm, example) for example in drawn]
            marks[task][effort] = sum(right for right, _ in results) / count
            marks[task][f"characters-{effort}"] = sum(n for _, n in results) / count
    return dict(marks)


def main() -> None:
    """Examine one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="nano")
    parser.add_argument("--count", type=int, default=40, help="problems per task and effort")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    marks = examine(LLM.load(args.model), args.count, args.seed)
    print("| task | low | medium | high | characters of analysis, low / medium / high |")
    print("|---|---|---|---|---|")
    for task, row in marks.items():
        exact = " | ".join(f"{row[e]:.1%}" for e in tasks.EFFORTS)
        lengths = " / ".join(f"{row[f'characters-{e}']:.0f}" for e in tasks.EFFORTS)
        print(f"| {task} | {exact} | {lengths} |")
    print(json.dumps({"model": args.model, "count": args.count, "marks": marks}))


if __name__ == "__main__":
    main()
