"""Decoding: a token for every row, step after step."""

from gptoss.backends.protocol import Batch
from gptoss.bench.cost import Cost
from gptoss.bench.machine import peak_memory
from gptoss.bench.report import Report
from gptoss.bench.subject import Rows, Subject, alternate, clock
from gptoss.llm.tokens import Progress


def decode(
    subject: Subject,
    *,
    context: int,
    steps: int,
    rounds: int = 3,
    watch: Progress | None = None,
) -> Report:
    """Tokens in a second of ``steps`` steps after ``context`` tokens, which are read untimed.

    A first round is thrown away; after it, before the roofline takes its buffer, peak memory is
    read. Which experts are visited is seen in one more step, and taken for the others too.
    """
    rows = Rows(subject, subject.prompts(context))
    first = rows.fill()

    def run() -> None:
        tokens = first
        for i in range(steps):
            tokens = rows.step(tokens, context + i)

    run()
    peak = peak_memory()
    visited: list[int] = []
    rows.rewind()
    rows.step(first, context, lambda batch, experts: visited.extend(experts))

    def work() -> float:
        rows.rewind()
        return clock(run)

    seconds, roofline = alternate(work, rounds, watch)
    each = [[token] for token in first]
    batches = (Batch.of(each, [context + i] * len(each), rows.slots) for i in range(steps))
    return Report(
        benchmark="decode",
        model=subject.model,
        plan=subject.plan,
        settings={"rows": subject.rows, "context": context, "steps": steps, "rounds": rounds},
        tokens=subject.rows * steps,
        cost=sum((subject.cost(batch, visited) for batch in batches), Cost()),
        seconds=seconds,
        roofline=roofline,
        peak_memory=peak,
        more={"experts_visited": sum(visited) / len(visited)},
    )
