"""A server from beginning to end: take the port, answer, let who is there finish, go."""

import asyncio
import socket
from collections.abc import Callable, Sequence
from ipaddress import ip_address

import uvicorn

from gptoss.engine.worker import WAITING, Worker
from gptoss.errors import GptOssError
from gptoss.grammar import prepare
from gptoss.llm import LLM
from gptoss.server.app import application, guarded
from gptoss.server.connection import LARGEST_HEADER, Connection, make_room
from gptoss.server.logs import note
from gptoss.server.served import Served
from gptoss.server.store import Store
from gptoss.tools import Toolbox


def serve_model(
    llm: LLM,
    name: str,
    *,
    waiting: int = WAITING,
    timeout: float | None = None,
    tools: Toolbox | None = None,
) -> Served:
    """A loaded model, ready to be asked: its engine belongs to a thread from now on.

    ``tools`` are started already, and whoever started them stops them.
    """
    prepare(llm.tokenizer)
    engine = llm.tokens.engine
    served = Served(
        name=name,
        tokenizer=llm.tokenizer,
        worker=Worker(engine, waiting=waiting),
        context=engine.longest,
        aliases=frozenset({name.rsplit("/", 1)[-1]}),
        timeout=timeout,
        tools=tools,
    )
    served.metrics.watch(served.worker, engine.max_tokens)
    served.worker.start()
    return served


def take_port(host: str, port: int) -> socket.socket:
    """A socket that is bound and does not listen yet; port 0 takes any that is free.

    Raises GptOssError.
    """
    where = f"{host}, port {port}"
    try:
        [(family, kind, _, _, address), *_] = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        taken = socket.socket(family, kind)
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
    except (OSError, OverflowError) as error:
        raise GptOssError(f"{where}: {getattr(error, 'strerror', None) or error}") from None
    return taken


def is_local(sockets: Sequence[socket.socket]) -> bool:
    """Whether only this machine can reach them."""
    hosts = [taken.getsockname()[0] for taken in sockets]
    return bool(hosts) and all(ip_address(host).is_loopback for host in hosts)


def url(taken: socket.socket) -> str:
    """Where clients find it."""
    host, port = taken.getsockname()[:2]
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"


class Server(uvicorn.Server):
    """Serves until it is told to stop; then requests may finish for ``grace`` seconds."""

    def __init__(
        self,
        served: Served,
        *,
        keys: Sequence[str] = (),
        origins: Sequence[str] = (),
        grace: float = 30.0,
        store: Store | None = None,
        ready: Callable[[], None] = lambda: None,
    ) -> None:
        """``ready`` is called when requests are taken; ``store`` is closed at the end."""
        app = application(served, store)
        around, self.gate = guarded(app, served, keys=keys, origins=origins)
        app.state.gate = self.gate
        self.served, self.grace, self.ready = served, grace, ready
        self.desk = app.state.desk
        super().__init__(
            uvicorn.Config(
                around,
                http=Connection,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=75,
                timeout_graceful_shutdown=int(grace) + 10,
                h11_max_incomplete_event_size=LARGEST_HEADER,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        make_room()
        await super().startup(sockets)
        self.gate.local = is_local(sockets or [])
        note("ready", {"model": self.served.name})
        self.ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """No new requests; those there are end within the time, with an error if need be."""
        self.gate.draining = True
        note("stopping", {"inside": self.gate.inside})
        worker = self.served.worker
        stopping = asyncio.ensure_future(asyncio.to_thread(worker.stop, self.grace))
        await super().shutdown(sockets)
        if self.force_exit:
            await asyncio.to_thread(worker.stop, 0.0)
        await stopping
        await self.desk.close()
        self.served.compiling.shutdown(wait=False, cancel_futures=True)
        note("stopped", {})
