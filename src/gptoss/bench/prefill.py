"""Prefill: reading a prompt, in steps as long as the engine's, until its next token is drawn."""

from gptoss.backends.protocol import Batch
from gptoss.bench.cost import Cost
from gptoss.bench.machine import peak_memory
from gptoss.bench.report import Report
from gptoss.bench.subject import Rows, Subject, alternate, clock
from gptoss.llm.tokens import Progress


def prefill(
    subject: Subject,
    *,
    tokens: int,
    rounds: int = 3,
    watch: Progress | None = None,
) -> Report:
    """Tokens in a second of a prompt of ``tokens``.

    A first round is thrown away; after it, before the roofline takes its buffer, peak memory is
    read. Which experts every step visits is seen in one more.
    """
    rows = Rows(subject, subject.prompts(tokens))
    rows.fill()
    peak = peak_memory()
    costs: list[Cost] = []

    def see(batch: Batch, visited: list[int]) -> None:
        costs.append(subject.cost(batch, visited))

    rows.fill(see)
    seconds, roofline = alternate(lambda: clock(rows.fill), rounds, watch)
    return Report(
        benchmark="prefill",
        model=subject.model,
        plan=subject.plan,
        settings={"tokens": tokens, "rounds": rounds},
        tokens=subject.rows * tokens,
        cost=sum(costs, Cost()),
        seconds=seconds,
        roofline=roofline,
        peak_memory=peak,
    )
