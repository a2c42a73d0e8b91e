"""Arguments of ``gptoss bench serve``: the load on a server."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from gptoss.cli.arguments import Option, WrongCommandLine
from gptoss.cli.endings import usage
from gptoss.cli.terminal import bar


@dataclass(frozen=True, kw_only=True)
class Serving:
    """The load on a server; None: not given."""

    requests: Annotated[int | None, Option(min=1, help="serve: how many in all", default="64")] = (
        None
    )
    rate: Annotated[
        float | None, Option(help="serve: requests in a second, whatever becomes of them")
    ] = None
    clients: Annotated[
        int | None, Option(min=1, help="serve: who ask one after the other", default="8")
    ] = None
    prompts: Annotated[
        str | None, Option(help="serve: words of a prompt, least:most", default="16:256")
    ] = None
    answers: Annotated[
        str | None, Option(help="serve: max_tokens, least:most", default="16:128")
    ] = None
    api: Annotated[
        Literal["chat", "completions"] | None, Option(help="serve: what to ask", default="chat")
    ] = None
    name: Annotated[
        str | None, Option(help="serve: the model to ask for", default="the server's first")
    ] = None
    key: Annotated[str | None, Option(help="serve: API key", envvar="GPTOSS_API_KEY")] = None
    timeout: Annotated[
        float | None, Option(min=0.1, help="serve: seconds without a byte", default="120")
    ] = None
    ignore_eos: Annotated[
        bool, Option("--ignore-eos", help="serve: ask for answers of full length")
    ] = False
    seed: Annotated[int | None, Option(min=0, help="serve: the same asks the same")] = None

    def given(self) -> list[str]:
        """Flags that were typed; the key may come from the environment."""
        names = (f.name for f in fields(self) if f.name != "key" and getattr(self, f.name))
        return [f"--{name.replace('_', '-')}" for name in names]

    def measure(self, url: str) -> dict[str, Any]:
        """Put the load on the server at ``url``."""
        from gptoss.bench.serve import Load, Server, first_model, serve

        if self.rate is not None and self.clients is not None:
            raise WrongCommandLine("--rate and --clients exclude each other")
        with usage(), bar("measuring") as watch:
            load = Load(
                requests=self.requests or 64,
                rate=self.rate,
                clients=self.clients or 8,
                prompt=extent("--prompts", self.prompts or "16:256"),
                answer=extent("--answers", self.answers or "16:128"),
                seed=self.seed or 0,
            )
            server = Server(
                url=url,
                model=self.name or first_model(url, self.key),
                api=self.api or "chat",
                key=self.key,
                timeout=self.timeout or 120.0,
                ignore_eos=self.ignore_eos,
            )
            return serve(server, load, watch)


def extent(flag: str, text: str) -> tuple[int, int]:
    """Least and most, of "16:256" or of one number."""
    low, _, high = text.partition(":")
    try:
        return int(low), int(high or low)
    except ValueError:
        raise WrongCommandLine(f"{flag}: {text!r} is no range such as 16:256") from None
