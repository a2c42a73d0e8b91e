"""What all requests have in common: how to draw, and what becomes of fields that are not ours.

Fields that would change the answer and are not supported are refused. Those that could not change
it, and those nobody knows, are ignored; the log and the header ``x-gptoss-ignored`` name them.
"""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from gptoss.backends.protocol import Sampling
from gptoss.engine.request import MOST_ROWS
from gptoss.server.errors import ApiError, refused
from gptoss.server.feed import Settings
from gptoss.server.served import Served

NAME = r"^[A-Za-z0-9_-]{1,64}$"
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
TokenKey = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]

# Would change the answer, and do not exist here; what to do instead, if there is something.
REFUSED = {
    "audio": "",
    "bad_words": "say logit_bias",
    "chat_template": "",
    "chat_template_kwargs": "say reasoning_effort",
    "continue_final_message": "",
    "documents": "",
    "function_call": "say tool_choice",
    "functions": "say tools",
    "guided_choice": "say response_format",
    "guided_grammar": "say response_format",
    "guided_json": "say response_format",
    "guided_regex": "say response_format",
    "length_penalty": "",
    "logits_processors": "say logit_bias",
    "prediction": "",
    "prompt_logprobs": "say echo and logprobs to /v1/completions",
    "reasoning": "say reasoning_effort",
    "structured_outputs": "say response_format",
    "suffix": "the model writes forwards only",
    "thinking": "say reasoning_effort",
    "truncate_prompt_tokens": "",
    "use_beam_search": "",
    "web_search_options": "",
}


class Body(BaseModel):
    """Any object of a request. Types are taken at their word: "1" is no number."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    def unknown(self) -> list[str]:
        """Fields that are ignored. Raises ApiError for those that must not be."""
        for name, value in (self.model_extra or {}).items():
            if name in REFUSED and value not in (None, False, 0, "", [], {}):
                hint = f"; {REFUSED[name]}" if REFUSED[name] else ""
                raise refused(f"{name} is not supported{hint}", name)
        return list(self.model_extra or {})


class Drawn(Body):
    """How to draw, in OpenAI's words and those that vLLM added."""

    model: Annotated[str, Field(max_length=512)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1 << 31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_ROWS)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=1 << 31)] | None = None
    ignore_eos: bool | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    logit_bias: Annotated[dict[TokenKey, Bias], Field(max_length=1024)] | None = None
    stream: bool | None = None
    user: str | None = None

    def settings(self, **more: Any) -> Settings:
        """For the engine; ``more`` completes it. Raises ValueError."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        given = {
            "seed": self.seed,
            "n": self.n,
            "min_tokens": self.min_tokens,
            "ignore_eos": self.ignore_eos,
            "stop": tuple(stop),
            "frequency_penalty": self.frequency_penalty,
            "presence_penalty": self.presence_penalty,
            "repetition_penalty": self.repetition_penalty,
            "logit_bias": {int(token): bias for token, bias in (self.logit_bias or {}).items()},
            "sampling": self._sampling(),
            **more,
        }
        return Settings(**{name: value for name, value in given.items() if value is not None})

    def _sampling(self) -> Sampling:
        given: dict[str, Any] = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": max(self.top_k or 0, 0),  # -1 is vLLM's word for all
            "min_p": self.min_p,
        }
        return Sampling(**{name: value for name, value in given.items() if value is not None})


class StreamOptions(Body):
    """Of a stream."""

    include_usage: bool | None = None


def check_model(name: str | None, served: Served) -> None:
    """Whether that is the model served here; a client that names none takes it. Raises ApiError."""
    if name is not None and name != served.name and name not in served.aliases:
        raise ApiError(
            404,
            f"the model {name[:100]!r} does not exist; {served.name!r} does",
            param="model",
            code="model_not_found",
        )


class Fault(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every answer that is no success."""

    error: Fault


Responses = dict[int | str, dict[str, Any]]
ERRORS: Responses = {
    400: {"model": ErrorBody, "description": "the request cannot be meant so"},
    401: {"model": ErrorBody, "description": "no key, or a wrong one"},
    403: {"model": ErrorBody, "description": "without a key, by a name that is not localhost"},
    404: {"model": ErrorBody, "description": "no such model"},
    408: {"model": ErrorBody, "description": "the request took too long to arrive"},
    413: {"model": ErrorBody, "description": "the request is too large"},
    429: {"model": ErrorBody, "description": "too many requests wait; see Retry-After"},
    500: {"model": ErrorBody, "description": "the server failed"},
    503: {"model": ErrorBody, "description": "the server is stopping; see Retry-After"},
}
EITHER: Responses = {
    **ERRORS,
    200: {
        "description": "one document, or with stream: true a stream of events",
        "content": {"application/json": {}, "text/event-stream": {}},
    },
}
