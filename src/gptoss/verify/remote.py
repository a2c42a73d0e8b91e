"""A server as a patient: anybody's that speaks OpenAI's completions and tells log-probabilities.

Servers differ in what they take (token ids or only text; a number of logprobs, or yes and a number
beside it) and in how they answer (OpenAI's old lists, or the newer objects with ids). What a server
takes is found out by trying.
"""

import json
from contextlib import closing
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from gptoss.errors import GptOssError
from gptoss.text.tokenizer import Tokenizer
from gptoss.verify.probes import STEPS, TOP, Step

MOST = 64 << 20  # bytes of a reply
ASKING: list[dict[str, Any]] = [{"logprobs": TOP}, {"logprobs": True, "top_logprobs": TOP}]


class Server:
    """``Server(url, tokenizer)(prompt)`` asks it to continue.

    Raises:
        ValueError: the address is none.
        GptOssError: it cannot be reached, refuses, or tells no log-probabilities.
    """

    def __init__(
        self,
        url: str,
        tokenizer: Tokenizer,
        *,
        model: str | None = None,
        key: str | None = None,
        timeout: float = 600.0,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url}: no address of a server such as http://127.0.0.1:8000/v1")
        self.url, self.parts, self.timeout = url, parts, timeout
        self.path = parts.path.rstrip("/") or "/v1"
        self.headers = {"Content-Type": "application/json"}
        if key:
            self.headers["Authorization"] = f"Bearer {key}"
        self.tokenizer, self.names = tokenizer, names(tokenizer)
        self.forms = [(ids, asking) for asking in ASKING for ids in (True, False)]
        self.model = model or self._first_model()

    def __call__(self, prompt: list[int]) -> list[Step]:
        """See ``probes.Patient``. The first form of question that is answered is kept."""
        failure = ""
        for form in self.forms:
            status, said = self._post(prompt, *form)
            steps = self._steps(said) if status == 200 else []
            if steps:
                self.forms = [form]
                return steps
            failure = failure or f"{status}: {json.dumps(said)[:200]}"
        raise GptOssError(
            f"{self.url}: /completions told no log-probabilities ({failure}). Some servers need an "
            "option for that."
        )

    def _post(self, prompt: list[int], ids: bool, asking: dict[str, Any]) -> tuple[int, Any]:
        body = {
            "model": self.model,
            "prompt": prompt if ids else self.tokenizer.decode(prompt),
            "max_tokens": STEPS,
            "temperature": 0.0,
            **asking,
        }
        return self._ask("POST", "/completions", json.dumps(body))

    def _first_model(self) -> str:
        _, said = self._ask("GET", "/models", None)
        try:
            return str(said["data"][0]["id"])
        except (LookupError, TypeError):
            raise GptOssError(f"{self.url}: /models names no model; name one yourself") from None

    def _ask(self, method: str, path: str, body: str | None) -> tuple[int, Any]:
        kind = HTTPSConnection if self.parts.scheme == "https" else HTTPConnection
        connection = kind(self.parts.hostname or "", self.parts.port, timeout=self.timeout)
        with closing(connection):
            try:
                connection.request(method, self.path + path, body, self.headers)
                response = connection.getresponse()
                said = response.read(MOST)
            except ConnectionRefusedError as error:
                raise GptOssError(f"{self.url}: cannot be reached ({error})") from None
            except (OSError, HTTPException) as error:  # some fall over a prompt that is no text
                return 0, str(error) or type(error).__name__
        try:
            return response.status, json.loads(said)
        except ValueError:
            return response.status, said.decode(errors="replace")

    def _steps(self, said: Any) -> list[Step]:
        """The steps of a reply, up to the first that cannot be read.

        The token drawn is the likeliest. Where several are, rounded logprobs perhaps, it is the one
        that is told; mlx-lm tells another, and then nobody knows what the next step followed.
        """
        steps = []
        try:
            told = said["choices"][0]["logprobs"]
            for drawn, top in _objects(told) if told.get("content") else _lists(told):
                known = {t: float(c["logprob"]) for c in top if (t := self._id(c)) is not None}
                if not known:
                    break
                best = [t for t, p in known.items() if p == max(known.values())]
                token = self._id(drawn)
                steps.append(Step(token if token in best else best[0], known))
                if token is None or (token not in best and len(best) > 1):
                    break
        except (LookupError, TypeError, ValueError, AttributeError):
            return []
        return steps[:STEPS]

    def _id(self, told: dict[str, Any]) -> int | None:
        if isinstance(told.get("id"), int):
            return int(told["id"])
        return self.names.get(str(told.get("token")))


def _objects(told: dict[str, Any]) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """The newer form: an object for each token, its candidates within."""
    return [(t, t["top_logprobs"]) for t in told["content"] if t.get("top_logprobs")]


def _lists(told: dict[str, Any]) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """OpenAI's first form: lists side by side, candidates by their text."""
    return [
        ({"token": token}, [{"token": t, "logprob": p} for t, p in top.items()])
        for token, top in zip(told["tokens"], told["top_logprobs"], strict=True)
    ]


def names(tokenizer: Tokenizer) -> dict[str, int | None]:
    """Tokens by how servers spell them; None where two are spelled alike."""
    found: dict[str, int | None] = {}
    for token in range(tokenizer.vocab_size):
        try:
            raw = tokenizer.decode_bytes([token])
        except ValueError:
            continue  # nobody's
        try:
            name = raw.decode()
        except UnicodeDecodeError:
            name = "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
        found[name] = None if name in found else token
    return found
