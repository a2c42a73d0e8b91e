"""What the model says, as items of a response and as the events by which they grow.

Each item is added, grows by deltas and is done, one after the other. Clients differ in what they
cannot do without, so nothing is left out:

    output_item.added
      content_part.added, (reasoning_text | output_text).delta ..., .done, content_part.done
      or function_call_arguments.delta ..., .done
      or those of a call that is run here: see ``responses_calls``
    output_item.done

Events come without their sequence_number: who sends them counts.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from gptoss.server.loop import Called, Calling, Ran
from gptoss.server.loop import Said as Event
from gptoss.server.responses_calls import Hosted
from gptoss.server.responses_items import function_call, new_id, output_text, reasoning
from gptoss.server.speech import logprobs_of
from gptoss.server.turn import Closed, Ended, Piece
from gptoss.text.parser import Repair
from gptoss.text.tokenizer import Tokenizer
from gptoss.text.tools import PATH
from gptoss.tools import Result

Kind = Literal["reasoning", "message", "function_call"]
Said = dict[str, Any]


@dataclass(slots=True)
class Growing:
    """The item that is being said."""

    index: int  # which message of the turn it is
    at: int  # and which item of the output
    kind: Kind
    id: str
    phase: str | None
    call: str | None
    name: str
    text: list[str] = field(default_factory=list)
    logprobs: list[Said] = field(default_factory=list)

    def part(self) -> Said:
        """Its content, up to now."""
        text = "".join(self.text)
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return output_text(text, self.logprobs)

    def item(self, status: str, *, seal: bool = False) -> Said:
        """All of it, up to now."""
        text = "".join(self.text)
        if self.kind == "function_call":
            return function_call(self.id, self.call or "", self.name, text, status)
        if self.kind == "reasoning":
            return reasoning(self.id, text, status, seal=seal)
        return {
            "type": "message",
            "id": self.id,
            "status": status,
            "role": "assistant",
            "phase": self.phase,
            "content": [self.part()] if self.text or status != "in_progress" else [],
        }


class Output:
    """The items of one response."""

    def __init__(self, tokenizer: Tokenizer, *, logprobs: bool = False, seal: bool = False) -> None:
        """``seal``: thoughts also in the form that clients carry; see ``reasoning``."""
        self._done: list[Said] = []
        self._growing: Growing | None = None
        self._hosted: Hosted | None = None  # a call that is being said or run here
        self._container = new_id("cntr")
        self._tokenizer, self._logprobs, self._seal = tokenizer, logprobs, seal

    @property
    def items(self) -> list[Said]:
        """All, the one that is being said included."""
        growing = [self._growing.item("in_progress")] if self._growing else []
        hosted = [self._hosted.item] if self._hosted else []
        return [*self._done, *growing, *hosted]

    def take(self, event: Event) -> Iterator[Said]:
        """What the turn says next."""
        if self._hosted is not None and self._is_other(event):
            yield from self._end_hosted(None)  # a call that nobody ran
        match event:
            case Piece():
                told = logprobs_of(event.drawn, self._tokenizer) if self._logprobs else []
                if event.text or (told and self._growing):
                    yield from self._begin(event.index, event.channel, event.recipient, event.call)
                    yield from self._grow(event.text, told)
            case Closed(index=index, message=m, call=call):
                cut, empty = Repair.CUT in m.repairs, not str(m.content).strip()
                if empty and not call and not self._growing and m.channel != "final":
                    return
                yield from self._begin(index, m.channel, m.recipient, call)
                if empty and call and not cut:
                    yield from self._grow("{}", [])
                yield from self.close("incomplete" if cut else "completed")
            case Calling() | Called() | Ran():
                yield from self._take_hosted(event)

    def close(self, status: str) -> Iterator[Said]:
        """The item that is being said is over; if there is none, nothing happens."""
        if self._hosted is not None:
            yield from self._end_hosted(None)
        if (growing := self._growing) is None:
            return
        self._growing = None
        text = "".join(growing.text)
        if growing.kind == "function_call":
            done = "function_call_arguments.done"
            yield _of(growing, done, name=growing.name, arguments=text)
        else:
            told: Said = {"text": text}
            if growing.kind == "message":
                told["logprobs"] = growing.logprobs
            yield _of(growing, f"{_stem(growing)}.done", content_index=0, **told)
            yield _of(growing, "content_part.done", content_index=0, part=growing.part())
        self._done.append(growing.item(status, seal=self._seal))
        yield _added(growing, "done", self._done[-1])

    def _take_hosted(self, event: Calling | Called | Ran) -> Iterator[Said]:
        call = event.recipient if isinstance(event, Calling) else _recipient(event)
        if self._hosted is None:
            at = len(self._done)
            self._hosted = Hosted(event.owner, call, event.index, at, self._container)
        match event:
            case Calling(text=text):
                yield from self._hosted.grow(text)
            case Called(message=m) if Repair.CUT in m.repairs:
                yield from self._end_hosted(None)
            case Called():
                yield from self._hosted.complete()
            case Ran(result=result):
                yield from self._end_hosted(result)

    def _is_other(self, event: Event) -> bool:
        """Whether it is of another message than the call."""
        assert self._hosted is not None
        return not isinstance(event, Ended) and event.index != self._hosted.index

    def _end_hosted(self, result: Result | None) -> Iterator[Said]:
        hosted, self._hosted = self._hosted, None
        assert hosted is not None
        yield from hosted.end(result)
        self._done.append(hosted.item)

    def _begin(
        self, index: int, channel: str | None, recipient: str | None, call: str | None
    ) -> Iterator[Said]:
        """An item, unless it is there."""
        if self._growing is not None:
            assert self._growing.index == index, "a message begins when the one before is closed"
            return
        kind: Kind = "reasoning" if channel == "analysis" else "message"
        kind = "function_call" if call else kind
        prefix = {"reasoning": "rs", "message": "msg", "function_call": "fc"}[kind]
        growing = self._growing = Growing(
            index,
            len(self._done),
            kind,
            new_id(prefix),
            "commentary" if channel == "commentary" else "final_answer",
            call,
            _name(recipient),
        )
        yield _added(growing, "added", growing.item("in_progress"))
        if kind != "function_call":
            yield _of(growing, "content_part.added", content_index=0, part=growing.part())

    def _grow(self, text: str, told: list[Said]) -> Iterator[Said]:
        growing = self._growing
        assert growing is not None
        growing.text.append(text)
        if growing.kind == "function_call":
            yield _of(growing, "function_call_arguments.delta", delta=text)
        elif growing.kind == "reasoning":
            yield _of(growing, "reasoning_text.delta", content_index=0, delta=text)
        else:
            growing.logprobs += told
            more = {"content_index": 0, "delta": text, "logprobs": told}
            yield _of(growing, "output_text.delta", **more)


def _recipient(event: Called | Ran) -> str:
    message = event.message if isinstance(event, Called) else event.call
    return message.recipient or ""


def _of(growing: Growing, name: str, /, **more: Any) -> Said:
    """An event inside an item."""
    return {
        "type": f"response.{name}",
        "item_id": growing.id,
        "output_index": growing.at,
        **more,
    }


def _added(growing: Growing, what: str, item: Said) -> Said:
    return {"type": f"response.output_item.{what}", "output_index": growing.at, "item": item}


def _stem(growing: Growing) -> str:
    return "reasoning_text" if growing.kind == "reasoning" else "output_text"


def _name(recipient: str | None) -> str:
    """Of the function that is called; whatever the model wrote, it is a name."""
    name = (recipient or "").removeprefix("functions.")
    return name if PATH.fullmatch(name) else "unknown"
