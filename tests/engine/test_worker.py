"""One thread steps; any number of others ask, wait and leave."""

import asyncio
import threading
import time

import pytest

from gptoss.backends.protocol import Sampling
from gptoss.engine import Engine, Request
from gptoss.engine.worker import Worker
from gptoss.errors import ContextExceeded, GptOssError, Overloaded
from tests.engine.scripted import Scripted, slots_in_use
from tests.engine.test_engine import alone, answers, markov

LONG = 60  # seconds no test should ever need


def wait_for(condition):
    end = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


class Gated(Scripted):
    """Computes only while the gate is open."""

    def __init__(self):
        super().__init__(markov)
        self.gate = threading.Event()

    def forward(self, batch, cache, trace=None):
        assert self.gate.wait(LONG)
        return super().forward(batch, cache, trace)


def asked(i, **more):
    how = {"max_tokens": 9, "sampling": Sampling(), "seed": i}
    return Request(prompt=[1, i], **{**how, **more})


def test_many_threads_get_their_own_answers():
    engine, got = Engine(Scripted(markov), rows=3), {}

    def ask(i):
        got[i] = answers(worker.submit(asked(i)))

    with Worker(engine) as worker:
        threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LONG)
    assert got == {i: alone(asked(i), vocab_size=64) for i in range(8)}
    assert not slots_in_use(engine)


def test_too_many_are_told_to_come_back():
    backend = Gated()
    with Worker(Engine(backend, rows=1), waiting=2) as worker:
        first = worker.submit(asked(0))
        wait_for(lambda: worker.stats.running)
        streams = [worker.submit(asked(i)) for i in (1, 2)]
        with pytest.raises(Overloaded, match="2 requests wait"):
            worker.submit(asked(3))
        backend.gate.set()
        assert [len(list(s)) for s in (first, *streams)] == [9, 9, 9]
        assert len(list(worker.submit(asked(3)))) == 9


def test_what_cannot_be_answered_is_refused_in_the_callers_thread():
    with Worker(Engine(Scripted(), max_tokens=8)) as worker:
        with pytest.raises(ContextExceeded):
            worker.submit(Request(prompt=[1] * 9))
        with pytest.raises(ValueError, match="token 64"):
            worker.submit(Request(prompt=[64]))


def test_cancelling_ends_who_runs_and_who_waits():
    backend = Gated()
    with Worker(Engine(backend, rows=1)) as worker:
        running, waiting = worker.submit(asked(0)), worker.submit(asked(1))
        running.cancel()
        worker.cancel(waiting)
        backend.gate.set()
        assert len(list(running)) <= 1 and not list(waiting)
        assert running.finish == waiting.finish == "cancelled"
        assert len(list(worker.submit(asked(2)))) == 9


def test_a_step_that_fails_ends_its_rows_and_not_the_thread():
    backend = Scripted(markov)
    with Worker(Engine(backend)) as worker:
        forward, backend.forward = backend.forward, lambda *_: 1 / 0
        with pytest.raises(ZeroDivisionError):
            list(worker.submit(asked(0)))
        backend.forward = forward
        assert answers(worker.submit(asked(1))) == alone(asked(1), vocab_size=64)


def test_trouble_outside_any_row_ends_all_and_not_the_thread():
    backend = Scripted(markov)
    engine = Engine(backend)
    with Worker(engine) as worker:
        plan, engine.scheduler.plan = engine.scheduler.plan, lambda: 1 / 0
        with pytest.raises(GptOssError, match="the engine failed.*ZeroDivision"):
            list(worker.submit(asked(0)))
        engine.scheduler.plan = plan
        assert answers(worker.submit(asked(1))) == alone(asked(1), vocab_size=64)


def test_stopping_lets_finish_who_can_in_time():
    worker = Worker(Engine(Scripted(markov)))
    worker.start()
    streams = [worker.submit(asked(i)) for i in range(4)]
    worker.stop(timeout=LONG)
    assert [(len(list(s)), s.finish) for s in streams] == [(9, "length")] * 4
    with pytest.raises(Overloaded, match="stopping"):
        worker.submit(asked(0))
    worker.stop()


def test_stopping_cancels_the_rest():
    backend = Gated()
    engine = Engine(backend, rows=1)
    worker = Worker(engine)
    worker.start()
    streams = [worker.submit(asked(i, max_tokens=None)) for i in range(3)]
    opens = threading.Timer(0.05, backend.gate.set)
    opens.start()
    worker.stop()
    opens.join()
    assert {s.finish for s in streams} == {"cancelled"} and not slots_in_use(engine)


def test_an_asyncio_server_awaits_tokens():
    async def one(worker, i):
        loop, queue = asyncio.get_running_loop(), asyncio.Queue()
        stream = worker.submit(asked(i), lambda d: loop.call_soon_threadsafe(queue.put_nowait, d))
        tokens = []
        while (drawn := await queue.get()) is not None:
            tokens.append(drawn.token)
        return tokens, stream.finish

    async def all_of(worker):
        return await asyncio.gather(*(one(worker, i) for i in range(5)))

    with Worker(Engine(Scripted(markov))) as worker:
        got = asyncio.run(all_of(worker))
    assert got == [(alone(asked(i), vocab_size=64)[0], "length") for i in range(5)]


def test_a_listener_that_fails_ends_its_request_and_no_other(caplog):
    def fail(drawn):
        raise RuntimeError("nobody is there")

    with Worker(Engine(Scripted(markov))) as worker:
        bad, good = worker.submit(asked(0), fail), worker.submit(asked(1))
        assert len(list(good)) == 9
        wait_for(lambda: bad.finish)
    assert bad.finish == "error" and "failed at its end" in caplog.text
