"""The response object: every member that the API knows, null where there is nothing to say."""

import time
from typing import Any

from gptoss.server.responses_body import ResponseRequest, TextBody
from gptoss.server.responses_tools import echoed
from gptoss.server.schema import Body
from gptoss.server.served import Served
from gptoss.server.turn import Usage

ECHOED = (
    "instructions",
    "max_output_tokens",
    "max_tool_calls",
    "previous_response_id",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "user",
)
EMPTY = (
    "access_programs",
    "billing",
    "completed_at",
    "conversation",
    "error",
    "image",
    "incomplete_details",
    "input_transformations",
    "moderation",
    "prompt",
    "prompt_cache_diagnostics",
    "prompt_cache_options",
    "tool_usage",
    "usage",
)


def document(body: ResponseRequest, id: str, served: Served) -> dict[str, Any]:
    """Of a response that has just begun."""
    text, choice = body.text or TextBody(), body.tool_choice
    sampling = body.settings().sampling
    return {
        "id": id,
        "object": "response",
        "created_at": int(time.time()),
        "status": "queued" if body.background else "in_progress",
        "background": bool(body.background),
        "model": served.name,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "reasoning": {"effort": body.effort, "summary": None},
        "service_tier": "default",
        "store": body.store is not False,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "frequency_penalty": body.frequency_penalty or 0.0,
        "presence_penalty": body.presence_penalty or 0.0,
        "text": {
            "format": text.format.echo if text.format else {"type": "text"},
            "verbosity": text.verbosity or "medium",
        },
        "tool_choice": choice.model_dump() if isinstance(choice, Body) else choice or "auto",
        "tools": echoed(body.tools or [], served),
        "top_logprobs": body.top_logprobs or 0,
        "truncation": body.truncation or "disabled",
        "metadata": body.metadata or {},
        **{name: getattr(body, name) for name in ECHOED},
        **dict.fromkeys(EMPTY),
    }


def usage(spent: Usage) -> dict[str, Any]:
    """What it cost. Nothing is charged for writing to the cache."""
    return {
        "input_tokens": spent.prompt,
        "input_tokens_details": {"cached_tokens": spent.cached, "cache_write_tokens": 0},
        "output_tokens": spent.completion,
        "output_tokens_details": {"reasoning_tokens": spent.reasoning},
        "total_tokens": spent.prompt + spent.completion,
    }
