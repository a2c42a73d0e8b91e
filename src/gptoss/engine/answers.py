"""From a step's logits to streams: which token each row draws, and what then becomes of it."""

from dataclasses import dataclass

from gptoss.backends.protocol import Backend, Logits
from gptoss.backends.sampling import sample
from gptoss.engine.draw import adjusted, check_finite, likeliest, log_softmax, uniform
from gptoss.engine.row import Row
from gptoss.engine.scheduler import Scheduler, Turn
from gptoss.engine.search import Beams, Best, hand_out
from gptoss.engine.stream import Drawn, Finish, Stream


@dataclass(slots=True)
class Draw:
    """Rows ``at`` and after of the logits say what follows a row, and what its draft's tokens."""

    row: Row
    at: int
    draft: list[int]
    tokens: list[int] | None = None  # what was drawn; None: to be drawn one after another


class Answers:
    """The only place where tokens are drawn, and where requests end."""

    def __init__(self, backend: Backend, scheduler: Scheduler) -> None:
        self.backend, self.scheduler = backend, scheduler
        self.completion = self.drafted = self.accepted = 0  # see ``Stats``

    def take(self, turns: list[Turn], starts: list[int], logits: Logits) -> None:
        """Draw from [W, V] ``logits`` of a step; those of turn i begin at ``starts[i]``."""
        draws: list[Draw] = []
        for turn, first, end in zip(turns, starts, [*starts[1:], len(logits)], strict=True):
            try:
                draws += self._took(turn, logits[first:end], end)
            except Exception as error:
                self.end(turn.row.stream, "error", error)
        self._sample([d for d in draws if d.row.plain and not d.row.request.beams], logits)
        for draw in draws:
            if draw.row.over:
                continue  # ended by what came before, in its other rows or in a listener
            try:
                self._advance(draw, logits)
            except Exception as error:  # of the model, a constraint or a listener
                self.end(draw.row.stream, "error", error)

    def end(self, stream: Stream, finish: Finish, error: Exception | None = None) -> None:
        """Take a request out, with all its rows. What an error leaves is not remembered."""
        if stream.finish is not None:
            return
        for row in [*self.scheduler.running, *self.scheduler.waiting]:
            if row.stream is stream:
                self.scheduler.release(row, remember=error is None)
        stream.end(finish, error)

    def stop(self, stream: Stream, answer: int) -> None:
        """End one of n answers; nothing happens before its first token."""
        for row in [*self.scheduler.running, *self.scheduler.waiting]:
            if row.stream is stream and row.index == answer and row.split and row.search is None:
                self._finish(row, "stop")

    def _took(self, turn: Turn, logits: Logits, end: int) -> list[Draw]:
        """A turn's tokens are in the cache now. What is to be drawn behind them."""
        row, before, draws, wanted = turn.row, turn.row.held, turn.draws, turn.wanted
        row.held += turn.count
        for b in row.request.boundaries:
            if before < b <= row.held and row.slot is not None and row.request.remember:
                self.scheduler.prefixes.copy(row.tokens[:b], row.slot)
        if row.request.prompt_logprobs is not None:
            self._score_prompt(row, before + wanted, logits)
        if not draws:
            return []
        rows = [row]
        if not row.split:
            row.split = True
            for i in range(1, row.request.rows):
                rows.append(row.sibling(i))
                self.scheduler.fork(row, rows[-1])
        return [Draw(r, end - 1 - len(turn.draft), turn.draft) for r in rows]

    def _score_prompt(self, row: Row, first: int, logits: Logits) -> None:
        """Logprobs of the prompt's tokens behind those from ``first`` on."""
        scores, k = row.stream.prompt_logprobs, row.request.prompt_logprobs or 0
        for place, x in enumerate(logits, first + 1):
            if len(scores) < place < row.start:
                check_finite(x[None])
                logprobs, token = log_softmax(self.backend.to_numpy(x[None])[0]), row.tokens[place]
                top = tuple(likeliest(logprobs, k))
                scores.append(Drawn(token, float(logprobs[token]), top))

    def _sample(self, draws: list[Draw], logits: Logits) -> None:
        """Let the backend draw where nothing comes between its logits and the rule."""
        if not draws:
            return
        at = [d.at + j for d in draws for j in range(len(d.draft) + 1)]
        if at != [*range(len(logits))]:
            logits = logits[at]
        rules = [d.row.request.sampling for d in draws for _ in range(len(d.draft) + 1)]
        uniforms = [
            uniform(d.row.seed, len(d.row.tokens) + j)
            for d in draws
            for j in range(len(d.draft) + 1)
        ]
        drawn = self.backend.sample(logits, rules, uniforms)
        for d in draws:
            d.tokens = drawn[: len(d.draft) + 1]
            del drawn[: len(d.draft) + 1]

    def _advance(self, draw: Draw, logits: Logits) -> None:
        """A row's next tokens: as many as its draft guessed right, and one."""
        row, draft, right = draw.row, draw.draft, 0
        if isinstance(row.search, Beams):
            return self._offer(row, row.search, logits[draw.at : draw.at + 1])
        jumped, finish = self._jump(row) if len(row.tokens) == row.start else (False, None)
        while not (jumped or finish):
            x = logits[draw.at + right : draw.at + right + 1]
            token = self._next(draw, right, x)
            finish = self._accept(row, token, x)
            if not finish:
                jumped, finish = self._jump(row)
            if jumped or right == len(draft) or token != draft[right]:
                break
            right += 1
            row.held += 1  # the cache has it, as a guess
        if draft:
            self._judge(row, len(draft), right)
        if row.over:
            return
        if finish:
            self._finish(row, finish)
        elif right < len(draft):
            self.scheduler.rewind(row)

    def _next(self, draw: Draw, j: int, x: Logits) -> int:
        """The token drawn from [1, V] logits, which are the draw's j-th."""
        check_finite(x)
        if draw.tokens is not None:
            return draw.tokens[j]
        row, request, host = draw.row, draw.row.request, self.backend.to_numpy(x)[0]
        host = adjusted(host, request, row.answer, row.constraint)
        return sample(host, request.sampling, uniform(row.seed, len(row.tokens)))

    def _jump(self, row: Row) -> tuple[bool, Finish | None]:
        """Take what a constraint forces without drawing; whether there was anything.

        Not where logprobs are asked for: those take logits.
        """
        forced = getattr(row.constraint, "forced", None)
        if forced is None or row.request.logprobs is not None or row.search is not None:
            return False, None
        finish: Finish | None = None
        tokens = list(forced())
        for token in tokens:
            finish = finish or self._accept(row, token, None)
        return bool(tokens), finish

    def _accept(self, row: Row, token: int, x: Logits) -> Finish | None:
        """The next token of a row, drawn from [1, V] logits. What that ends it with, if it does."""
        request, stream, logprob = row.request, row.stream, None
        top: tuple[tuple[int, float], ...] = ()
        if request.logprobs is not None or row.search is not None:
            logprobs = log_softmax(self.backend.to_numpy(x)[0])
            logprob, top = float(logprobs[token]), tuple(likeliest(logprobs, request.logprobs or 0))
            row.score += logprob
        row.tokens.append(token)
        if row.constraint is not None:
            row.constraint.accept(token)
        self.completion += 1
        stream.completion += 1
        drawn = Drawn(token, logprob, top, row.index)
        if row.search is None:
            stream.put(drawn)
        else:
            row.drawn.append(drawn)
        if token in request.stop_tokens:
            return "stop"
        if row.over:  # a listener has had enough
            return stream.finish or "stop"
        return "length" if len(row.tokens) >= row.limit else None

    def _judge(self, row: Row, drafted: int, right: int) -> None:
        """Learn from a draft."""
        assert row.lookup is not None
        row.lookup.judge(drafted, right)
        self.drafted, self.accepted = self.drafted + drafted, self.accepted + right
        row.stream.drafted += drafted
        row.stream.accepted += right

    def _finish(self, row: Row, finish: Finish) -> None:
        """One of a request's answers is whole."""
        stream = row.stream
        self.scheduler.release(row)
        if isinstance(row.search, Best):
            if row.search.add(row, finish):
                hand_out(stream, row.search.found)
            return
        stream.answers[row.index].finish = finish
        if all(answer.finish is not None for answer in stream.answers):
            stream.end(finish)

    def _offer(self, row: Row, beams: Beams, x: Logits) -> None:
        """One beam's next tokens; with the last beam's, all go on."""
        check_finite(x)
        host = self.backend.to_numpy(x)[0]
        if not row.plain:
            host = adjusted(host, row.request, row.answer, row.constraint)
        if beams.offer(row, log_softmax(host)):
            self._spread(beams)

    def _spread(self, beams: Beams) -> None:
        """Beams that live on, in slots forked from those they continue."""
        parents, stream, kept = beams.live, beams.live[0].stream, beams.advance()
        last = {parent: i for i, (parent, _) in enumerate(kept)}
        beams.live = []
        for i, (parent, drawn) in enumerate(kept):
            child = parent.sibling(i)
            if last[parent] == i:
                self.scheduler.replace(parent, child)
            else:
                self.scheduler.fork(parent, child)
            self._extend(child, drawn)
            beams.live.append(child)
        for parent in parents:
            self.scheduler.release(parent, remember=not kept)
        if not beams.live:
            hand_out(stream, beams.found)

    def _extend(self, row: Row, drawn: Drawn) -> None:
        assert drawn.logprob is not None
        row.tokens.append(drawn.token)
        row.drawn.append(drawn)
        row.score += drawn.logprob
        if row.constraint is not None:
            row.constraint.accept(drawn.token)
        row.stream.completion += 1
        self.completion += 1
