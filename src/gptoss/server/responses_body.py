"""What a client asks of ``/v1/responses``.

Every field is supported, refused in a sentence that says what to do, or ignored, and then the
header ``x-gptoss-ignored`` names it. Beyond OpenAI's there are those of ``schema.Drawn``: seed,
stop, top_k and others.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from gptoss.grammar import Format, JsonSchema, as_format
from gptoss.llm.llm import conversation
from gptoss.server.errors import refused, refusing
from gptoss.server.messages import MOST_MESSAGES, Name
from gptoss.server.responses_input import Id, Item, ItemReference, form
from gptoss.server.responses_items import Reader, leading, message
from gptoss.server.responses_tools import AnyChoice, AnyTool, functions, offered, run_here
from gptoss.server.schema import Body, Drawn
from gptoss.server.served import Served
from gptoss.server.turn import Ask
from gptoss.text.messages import Developer, Message, Tool

# Of chat completions, or of what does not exist here: said by who means something by it.
ELSEWHERE = {
    "conversation": "say previous_response_id",
    "functions": "say tools",
    "logprobs": "say top_logprobs",
    "max_completion_tokens": "say max_output_tokens",
    "max_tokens": "say max_output_tokens",
    "messages": "say input",
    "prompt": "say instructions and input",
    "reasoning_effort": "say reasoning.effort",
    "response_format": "say text.format",
}
LOGPROBS, SEALED = "message.output_text.logprobs", "reasoning.encrypted_content"
Key = Annotated[str, Field(max_length=64)]
Value = Annotated[str, Field(max_length=512)]
Short = Annotated[str, Field(max_length=512)]


class ReasoningBody(Body):
    """How much to think. Of summaries there are none: the thoughts themselves are given."""

    effort: Literal["low", "medium", "high"] | None = None


class FormatBody(Body):
    """The form of the final answer. Of ``json_schema``, ``schema`` is always held to."""

    type: Literal["text", "json_object", "json_schema", "regex", "grammar"]
    name: Name | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None

    def format(self) -> Format | None:
        """For the grammar. Raises ApiError."""
        if self.type == "json_schema" and self.name is None:
            raise refused("text.format: json_schema needs a name", "text.format.name")
        with refusing("text.format"):
            try:
                return as_format(self.echo)
            except ValueError as error:
                raise ValueError(str(error).replace("response_format", "text.format")) from None

    @property
    def echo(self) -> dict[str, Any]:
        """As the answer has it."""
        return self.model_dump(by_alias=True, exclude_none=True)


class TextBody(Body):
    """The form of the text. ``verbosity`` is ignored: the model knows no such word."""

    format: FormatBody | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


Input = Annotated[
    Annotated[str, Tag("a-text")]
    | Annotated[list[Item], Field(max_length=MOST_MESSAGES), Tag("a-list")],
    Discriminator(
        form,
        custom_error_type="input",
        custom_error_message="a string or a list of items was expected",
    ),
]
Included = Literal[
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
]


class ResponseRequest(Drawn):
    """A conversation to go on with."""

    input: Input | None = None
    instructions: str | None = None
    previous_response_id: Id | None = None
    store: bool | None = None
    background: bool | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=1 << 31)] | None = None
    reasoning: ReasoningBody | None = None
    text: TextBody | None = None
    tools: Annotated[list[AnyTool], Field(max_length=256)] | None = None
    tool_choice: AnyChoice | None = None
    parallel_tool_calls: bool | None = None  # the model makes one call a turn in any case
    include: Annotated[list[Included], Field(max_length=16)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    metadata: Annotated[dict[Key, Value], Field(max_length=16)] | None = None
    max_tool_calls: Annotated[int, Field(ge=0)] | None = None  # of tools that are run here
    safety_identifier: Short | None = None
    prompt_cache_key: Short | None = None  # prompts that begin alike share in any case
    prompt_cache_retention: Short | None = None
    service_tier: Short | None = None

    def unknown(self) -> list[str]:
        """See Body.unknown; tools that do not exist here are ignored too."""
        for name, value in (self.model_extra or {}).items():
            if name in ELSEWHERE and value is not None:
                raise refused(f"{name} is not of this API; {ELSEWHERE[name]}", name)
        return super().unknown()

    def check(self) -> None:
        """What can be said without looking at anything else. Raises ApiError."""
        if self.input is None and self.previous_response_id is None:
            raise refused("input: a string or a list of items is needed", "input")
        if (self.n or 1) > 1:
            raise refused("n: a response has one answer", "n")
        if self.background and self.store is False:
            raise refused("background: such a response must be stored", "background")

    def items(self) -> list[dict[str, Any]]:
        """The input as it is kept; of references, only their type and id."""
        if isinstance(self.input, str):
            return [message("user", self.input)]
        return [
            {"type": "item_reference", "id": item.id}
            if isinstance(item, ItemReference)
            else item.kept()
            for item in self.input or []
        ]

    @property
    def logprobs(self) -> bool:
        """Whether tokens of the text are told."""
        return bool(self.top_logprobs) or LOGPROBS in (self.include or [])

    @property
    def sealed(self) -> bool:
        """Whether thoughts are also given in the form that clients carry."""
        return SEALED in (self.include or [])

    def ask(self, items: Sequence[Mapping[str, Any]], served: Served) -> Ask:
        """The turn behind all of these items. Raises ApiError, or ValueError."""
        tools, choice = offered(functions(self.tools or []), self.tool_choice)
        ours = run_here(self.tools or [], self.tool_choice, served)
        said = self.text.format if self.text else None
        format = said.format() if said else None
        messages = self._conversation(items, tools, format, served)
        if ours and served.tools is not None:
            messages = served.tools.offered(messages, ours)
        return Ask(
            messages=messages,
            settings=self.settings(
                max_tokens=self.max_output_tokens,
                logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            ),
            format=format,
            choice=choice,
            tools=ours,
            calls=self.max_tool_calls,
        )

    def _conversation(
        self,
        items: Sequence[Mapping[str, Any]],
        tools: Sequence[Tool],
        format: Format | None,
        served: Served,
    ) -> list[Message]:
        front = leading(items)
        told = [*([self.instructions] if self.instructions else []), *front]
        if isinstance(format, JsonSchema):
            assert self.text and self.text.format
            shown = json.dumps(format.schema, ensure_ascii=False, separators=(",", ":"))
            name = self.text.format.name or "answer"
            told.append(f"# Response Formats\n\n## {name}\n\n{shown}")
        reader = Reader(served.thoughts)
        for item in items[len(front) :]:
            reader.read(item)
        developer = Developer(instructions="\n\n".join(told) if told else None, tools=tuple(tools))
        turns = [Message(role="developer", content=developer), *reader.messages]
        return conversation(turns, effort=self.effort, current_date=date.today().isoformat())

    @property
    def effort(self) -> Literal["low", "medium", "high"]:
        """How much to think."""
        return (self.reasoning and self.reasoning.effort) or "medium"
