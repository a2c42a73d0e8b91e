"""Text to tokens and back over HTTP, as lm-eval and vLLM's clients ask for it."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from gptoss.server.completions import Tokens
from gptoss.server.errors import refused, refusing
from gptoss.server.gate import tell
from gptoss.server.messages import MOST_MESSAGES, AnyMessage, as_conversation
from gptoss.server.schema import ERRORS, Body, check_model
from gptoss.server.served import Served
from gptoss.text import harmony

BOS, EOS = "<|startoftext|>", "<|endoftext|>"  # alone, these two are themselves: lm-eval asks so
router = APIRouter(responses=ERRORS)


class TokenizeRequest(Body):
    """A text, or a conversation. ``add_special_tokens`` is ignored: harmony adds none to a text."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[AnyMessage], Field(min_length=1, max_length=MOST_MESSAGES)] | None = (
        None
    )
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeAnswer(BaseModel):
    """Tokens."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Body):
    """Tokens."""

    model: str | None = None
    tokens: Tokens | Annotated[list[int], Field(max_length=0)]


class DetokenizeAnswer(BaseModel):
    """The text of tokens; bytes that are no UTF-8 become U+FFFD."""

    prompt: str


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request) -> TokenizeAnswer:
    """The tokens of a text, or of a conversation up to the model's turn."""
    served: Served = request.app.state.served
    check_model(body.model, served)
    tell(request, ignored=body.unknown())
    if (body.prompt is None) == (body.messages is None):
        raise refused("either prompt or messages must be given", "prompt")
    with refusing():
        return await asyncio.to_thread(_tokenized, served, body)


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request) -> DetokenizeAnswer:
    """The text of tokens."""
    served: Served = request.app.state.served
    check_model(body.model, served)
    tell(request, ignored=body.unknown())
    return DetokenizeAnswer(prompt=await asyncio.to_thread(served.tokenizer.decode, body.tokens))


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request) -> dict[str, Any]:
    """What a client must know to use the tokenizer from afar."""
    served: Served = request.app.state.served
    return {
        "tokenizer_class": "GptOssTokenizer",
        "model_max_length": served.context,
        "vocab_size": served.tokenizer.vocab_size,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "stop_tokens": sorted(served.tokenizer.stop_tokens),
        "special_tokens": served.tokenizer.specials,
        "chat_template": None,
    }


def _tokenized(served: Served, body: TokenizeRequest) -> TokenizeAnswer:
    tokens = _tokens(served, body)
    names = [served.tokenizer.decode([t]) for t in tokens] if body.return_token_strs else None
    return TokenizeAnswer(
        count=len(tokens), max_model_len=served.context, tokens=tokens, token_strs=names
    )


def _tokens(served: Served, body: TokenizeRequest) -> list[int]:
    if body.prompt in (BOS, EOS):
        return [served.tokenizer.special(body.prompt)]
    if body.prompt is not None:
        return served.tokenizer.encode(body.prompt)
    told = as_conversation(body.messages or [], effort="medium", tools=(), thoughts=served.thoughts)
    return harmony.render_for_completion(told, served.tokenizer)
