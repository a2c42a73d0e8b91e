"""A server as a patient: anybody's that speaks OpenAI's completions and tells log-probabilities.

Servers differ in what they take (token ids or only text; a number of logprobs, or yes and a number
beside it) and in how they answer (OpenAI's old lists, or the newer objects with ids). What a server
takes is found out by trying.
"""

import json
from contextlib import closing
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import SplitResult, urlsplit

from gptoss.errors import GptOssError
from gptoss.text.tokenizer import Tokenizer
from gptoss.verify.patients import STEPS, TOP, Seen, Step, Thoughts

MOST = 64 << 20  # bytes of a reply
Form = dict[str, Any]
ASKING: list[Form] = [{"logprobs": TOP}, {"logprobs": True, "top_logprobs": TOP}]
PLAIN = {"logprobs", "top_logprobs"}
# The prompt's own tokens: in OpenAI's first form, in vLLM's; or not at all.
SCORING: list[Form] = [{"echo": True}, {"prompt_logprobs": TOP}, {}]


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
        if parts.scheme not in ("http", "https") or not parts.hostname or not _has_port(parts):
            raise ValueError(f"{url}: no address of a server such as http://127.0.0.1:8000/v1")
        if key and not (key.isascii() and key.isprintable()):
            raise ValueError("the key has characters that cannot be sent")
        self.url, self.parts, self.timeout = url, parts, timeout
        self.path = parts.path.rstrip("/") or "/v1"
        self.headers = {"Content-Type": "application/json"}
        if key:
            self.headers["Authorization"] = f"Bearer {key}"
        self.tokenizer, self.names = tokenizer, names(tokenizer)
        self.forms = [
            (ids, asking | scoring)
            for scoring in SCORING
            for asking in ASKING
            for ids in (True, False)
        ]
        self.model = model or self._first_model()

    def __call__(self, prompt: list[int]) -> Seen:
        """See ``patients.Patient``. The first form of question that is answered is kept; one that
        asks for the prompt's own tokens, where these are told.
        """
        failure = ""
        for form in self.forms:
            status, said = self._post(prompt, *form)
            steps = self._steps(said, prompt) if status == 200 else []
            scored = self._scored(said, prompt) if steps else None
            if steps and (scored is not None or form[1].keys() <= PLAIN or len(self.forms) == 1):
                self.forms = [form]
                return Seen(prompt, steps, scored or [])
            failure = failure or f"{status}: {json.dumps(said)[:200]}"
        raise GptOssError(
            f"{self.url}: /completions told no log-probabilities ({failure}). Some servers need an "
            "option for that."
        )

    def _post(self, prompt: list[int], ids: bool, asking: Form) -> tuple[int, Any]:
        body = {
            "model": self.model,
            "prompt": prompt if ids else self.tokenizer.decode(prompt),
            "max_tokens": STEPS,
            "temperature": 0.0,
            **asking,
        }
        return self._ask("POST", "/completions", json.dumps(body))

    def _first_model(self) -> str:
        status, said = self._ask("GET", "/models", None)
        if not status:
            raise GptOssError(f"{self.url}: cannot be reached ({said})")
        try:
            return str(said["data"][0]["id"])
        except (LookupError, TypeError):
            told = f"{status}: {json.dumps(said)[:200]}"
            raise GptOssError(
                f"{self.url}: /models names no model ({told}); name one yourself"
            ) from None

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
            except TimeoutError:
                raise GptOssError(f"{self.url}: no answer in {self.timeout:g} seconds") from None
            except (
                OSError,
                HTTPException,
                UnicodeError,
            ) as error:  # some fall over a prompt that is no text
                return 0, str(error) or type(error).__name__
        try:
            return response.status, json.loads(said)
        except ValueError:
            return response.status, said.decode(errors="replace")

    def _steps(self, said: Any, prompt: list[int]) -> list[Step]:
        """The steps of a reply, up to the first that cannot be read.

        The token drawn is the likeliest. Where several are, rounded logprobs perhaps, it is the one
        that is told; mlx-lm tells another, and then nobody knows what the next step followed.
        """
        steps = []
        try:
            told = _told(said)
            for drawn, top in told[len(prompt) if _is_echo(told, prompt) else 0 :]:
                known = self._thoughts(top)
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

    def _scored(self, said: Any, prompt: list[int]) -> list[Thoughts] | None:
        """What was thought behind each token of the prompt but the last; None: it is not told."""
        try:
            choice, told = said["choices"][0], _told(said)
            if _is_echo(told, prompt):
                return [self._thoughts(top) for _, top in told[1 : len(prompt)]]
            scored = [
                {int(t): float(c["logprob"]) for t, c in each.items()}
                for each in choice["prompt_logprobs"][1:]
            ]
            return scored if len(scored) == len(prompt) - 1 else None
        except (LookupError, TypeError, ValueError, AttributeError):
            return None

    def _thoughts(self, top: list[Form]) -> Thoughts:
        return {t: float(c["logprob"]) for c in top if (t := self._id(c)) is not None}

    def _id(self, told: dict[str, Any]) -> int | None:
        if isinstance(told.get("id"), int):
            return int(told["id"])
        return self.names.get(str(told.get("token")))


def _has_port(parts: SplitResult) -> bool:
    """Whether the port, if it is named, is one."""
    try:
        return parts.port != 0
    except ValueError:
        return False


def _told(said: Any) -> list[tuple[Form, list[Form]]]:
    """Tokens and their candidates, in the newer form, an object for each token, or in OpenAI's
    first, lists side by side, where candidates go by their text and a first token has none.
    """
    told = said["choices"][0]["logprobs"]
    if told.get("content"):
        return [(t, t["top_logprobs"]) for t in told["content"] if t.get("top_logprobs")]
    return [
        ({"token": token}, [{"token": t, "logprob": p} for t, p in (top or {}).items()])
        for token, top in zip(told["tokens"], told["top_logprobs"], strict=True)
    ]


def _is_echo(told: list[tuple[Form, list[Form]]], prompt: list[int]) -> bool:
    """Whether the prompt stands in front: of its first token nobody thought anything."""
    return len(told) > len(prompt) and not told[0][1]


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
