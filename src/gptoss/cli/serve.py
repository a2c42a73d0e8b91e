"""``gptoss serve``: the model over HTTP, as OpenAI's API has it.

gptoss serve
gptoss serve openai/gpt-oss-20b --host 0.0.0.0 --api-key "$KEY"
gptoss serve openai/gpt-oss-20b --tool python --tool browser=./papers
curl http://127.0.0.1:8000/v1/chat/completions -H 'content-type: application/json' \\
  -d '{"messages": [{"role": "user", "content": "What is 17 + 25?"}]}'
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from gptoss.cli import options
from gptoss.cli.arguments import Option
from gptoss.cli.tools import Tools
from gptoss.cli.tracing import Recording
from gptoss.errors import GptOssError

LOCAL = ("127.0.0.1", "::1", "localhost")


def run(
    model: options.Model = "nano",
    host: Annotated[str, Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="0 takes any that is free")] = 8000,
    name: Annotated[
        str | None, Option(help="what clients call the model", default="its own")
    ] = None,
    api_key: Annotated[
        list[str] | None,
        Option(help="what clients must know; may be repeated", envvar="GPTOSS_API_KEY"),
    ] = None,
    cors: Annotated[
        list[str] | None, Option(help="origin of web pages that may call; may be repeated")
    ] = None,
    conversations: Annotated[
        int, Option(min=1, help="whose room (--context) the cache has together")
    ] = 8,
    waiting: Annotated[int, Option(min=1, help="most answers that may wait their turn")] = 256,
    timeout: Annotated[
        float | None,
        Option(min=0.001, help="seconds for one request", default="as long as it takes"),
    ] = None,
    grace: Annotated[
        float, Option(min=0.0, help="seconds in which requests may finish at the end")
    ] = 30.0,
    store: Annotated[
        Path | None, Option(help="file for responses", default="memory, the newest only")
    ] = None,
    *,
    tools: Tools,
    loading: options.Loading,
    recording: Recording,
) -> None:
    """Serve a model over HTTP until Ctrl-C. The URL goes to stdout, a log to stderr."""
    try:
        from gptoss.server.logs import set_up
        from gptoss.server.run import Server, serve_model, take_port, url
        from gptoss.server.store import Store
    except ImportError as error:
        raise GptOssError(
            f"serving needs {error.name}: install it with `pip install 'gptoss[serve]'`"
        ) from None
    writer = recording.writer()
    taken = take_port(host, port)
    kept = Store(store)
    if host not in LOCAL and not api_key:
        print("gptoss: anybody who can reach this port may use it: no --api-key", file=sys.stderr)
    with tools.box() as box:
        llm = loading.load(model, conversations)
        recording.attach(writer, llm, model)
        called = name or own_name(model)
        served = serve_model(llm, called, waiting=waiting, timeout=timeout, tools=box)
        set_up()
        server = Server(
            served,
            keys=api_key or [],
            origins=cors or [],
            grace=grace,
            store=kept,
            ready=lambda: print(url(taken), flush=True),
        )
        server.run([taken])
    if writer is not None:
        writer.close()


def own_name(model: str) -> str:
    """The id of a model: its Hugging Face id, or the name of its folder or file."""
    from gptoss.llm.models import PUBLISHED

    if Path(model).expanduser().exists():
        return Path(model).expanduser().resolve().name
    return PUBLISHED.get(model, model)
