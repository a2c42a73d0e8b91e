"""What models really write after "<|start|>assistant", and how we read it.

⟦channel⟧ is "<|channel|>" spelled out as ordinary text. The known functions are TOOLS.
"""

from dataclasses import dataclass, field

from gptoss.text.messages import Message
from gptoss.text.parser import Repair as R

TOOLS = ("get_weather", "get_weather_forecast", "functions.ping")
WEATHER = "functions.get_weather"


@dataclass(frozen=True)
class Case:
    about: str
    stream: str
    messages: list[Message]
    loose: list[R] = field(default_factory=list)  # repairs that belong to no message
    tail: str = ""


def said(content, channel="final", *repairs, role="assistant", to=None, kind=None, name=None):
    return Message(
        role=role,
        content=content,
        name=name,
        channel=channel,
        recipient=to,
        content_type=kind,
        repairs=repairs,
    )


def call(content, *repairs, channel="commentary", to=WEATHER, kind="json"):
    return said(content, channel, *repairs, to=to, kind=kind)


CASES = [
    # No header, or less of one than there should be.
    Case(
        "a refusal comes as bare text",
        "I'm sorry, but I can't help with that.<|return|>",
        [said("I'm sorry, but I can't help with that.", "final", R.NO_HEADER)],
    ),
    Case("a bare word", "No.<|return|>", [said("No.", "final", R.NO_HEADER)]),
    Case(
        "bare text in place of the final turn",
        "<|channel|>analysis<|message|>No.<|end|>I can't help with that.<|return|>",
        [said("No.", "analysis"), said("I can't help with that.", "final", R.NO_HEADER)],
    ),
    Case(
        "bare text after <|start|>assistant",
        "<|channel|>analysis<|message|>No.<|end|><|start|>assistantI'm sorry.<|return|>",
        [said("No.", "analysis"), said("I'm sorry.", "final", R.NO_MESSAGE, R.NO_CHANNEL)],
    ),
    Case(
        "bare text after <|start|>",
        "<|channel|>analysis<|message|>No.<|end|><|start|>Sorry, no.<|return|>",
        [
            said("No.", "analysis"),
            said("Sorry, no.", "final", R.NO_MESSAGE, R.NO_ROLE, R.NO_CHANNEL),
        ],
    ),
    Case(
        "bare text that begins as a channel",
        "final call",
        [said("final call", "final", R.NO_HEADER, R.CUT)],
    ),
    Case("no channel", "<|message|>Hello<|return|>", [said("Hello", "final", R.NO_CHANNEL)]),
    Case(
        "no channel, but a recipient",
        f" to={WEATHER} <|constrain|>json<|message|>{{}}<|call|>",
        [call("{}", R.NO_CHANNEL)],
    ),
    Case(
        "<|channel|> without a word",
        "<|channel|><|message|>Hello<|return|>",
        [said("Hello", "final", R.NO_WORD, R.NO_CHANNEL)],
    ),
    Case(
        "<|channel|> forgotten",
        "final<|message|>Hello<|return|>",
        [said("Hello", "final", R.BARE_CHANNEL)],
    ),
    Case(
        "<|message|> forgotten",
        "<|channel|>final Hello there.<|return|>",
        [said("Hello there.", "final", R.NO_MESSAGE)],
    ),
    Case(
        "<|message|> forgotten, the text glued to the channel",
        "<|channel|>analysisWe need to think.<|end|>",
        [said("We need to think.", "analysis", R.NO_MESSAGE)],
    ),
    Case(
        "<|message|> forgotten, a word that only begins like a channel",
        "<|channel|>finally, it works<|return|>",
        [said("finally, it works", "final", R.NO_MESSAGE, R.NO_CHANNEL)],
    ),
    Case(
        "<|message|> forgotten, the text begins with a header's word",
        "<|channel|>final final answer: json<|return|>",
        [said("final answer: json", "final", R.NO_MESSAGE)],
    ),
    Case(
        "<|message|> forgotten in a call",
        f'<|channel|>commentary to={WEATHER} <|constrain|>json{{"city": "Oslo"}}<|call|>',
        [call('{"city": "Oslo"}', R.NO_MESSAGE)],
    ),
    Case(
        "<|message|> forgotten in a call, the arguments glued to the name",
        f'<|channel|>commentary to={WEATHER}{{"city": "Oslo"}}<|call|>',
        [call('{"city": "Oslo"}', R.NO_MESSAGE, kind=None)],
    ),
    Case(
        "a call that ends with its header",
        "<|channel|>commentary to=functions.ping<|call|>",
        [call("", R.NO_MESSAGE, R.EMPTY, to="functions.ping", kind=None)],
    ),
    Case(
        "an end token inside a header",
        "<|channel|>final<|end|><|message|>Hello<|return|>",
        [said("Hello", "final", R.END_IN_HEADER)],
    ),
    Case(
        "an end token in place of <|message|>",
        "<|channel|>final<|end|>hello<|return|>",
        [said("hello", "final", R.END_IN_HEADER, R.NO_MESSAGE)],
    ),
    Case(
        "a header and nothing else",
        "<|channel|>final<|return|>",
        [],
        loose=[R.END_IN_HEADER, R.CUT],
        tail="final",
    ),
    # Structure once too often, or once too few.
    Case(
        "a redundant <|return|> after a complete answer",
        "<|channel|>final<|message|>Hello<|return|><|return|>",
        [said("Hello")],
        loose=[R.REDUNDANT_END],
    ),
    Case(
        "<|end|> and <|return|>",
        "<|channel|>final<|message|>Hello<|end|><|return|>",
        [said("Hello")],
        loose=[R.REDUNDANT_END],
    ),
    Case(
        "<|return|>, then <|endoftext|>",
        "<|channel|>final<|message|>Hello<|return|><|endoftext|>",
        [said("Hello")],
        loose=[R.REDUNDANT_END],
    ),
    Case(
        "<|endoftext|> alone",
        "<|channel|>final<|message|>Hello<|endoftext|>",
        [said("Hello", "final", R.ENDOFTEXT)],
    ),
    Case(
        "the opening repeated",
        "<|start|>assistant<|channel|>final<|message|>Hello<|return|>",
        [said("Hello", "final", R.REPEATED_START)],
    ),
    Case(
        "<|start|> thrice",
        "<|start|><|start|>assistant<|start|>assistant<|channel|>final<|message|>Hello<|return|>",
        [said("Hello", "final", R.REPEATED_START)],
    ),
    Case(
        "the role repeated",
        "assistant<|channel|>final<|message|>Hello<|return|>",
        [said("Hello", "final", R.REPEATED_ROLE)],
    ),
    Case(
        "<|start|> forgotten",
        "<|channel|>analysis<|message|>Hm.<|end|>assistant<|channel|>final<|message|>Hello<|return|>",
        [said("Hm.", "analysis"), said("Hello", "final", R.NO_START)],
    ),
    Case(
        "<|end|> forgotten",
        "<|channel|>analysis<|message|>Hm.<|start|>assistant<|channel|>final<|message|>Hi<|return|>",
        [said("Hm.", "analysis", R.NO_END), said("Hi")],
    ),
    Case(
        "<|end|><|start|>assistant forgotten",
        "<|channel|>analysis<|message|>Hm.<|channel|>final<|message|>Hello<|return|>",
        [said("Hm.", "analysis", R.NO_END), said("Hello", "final", R.NO_START)],
    ),
    Case(
        "everything but <|channel|> forgotten",
        "<|channel|>analysis<|message|>Hm.<|channel|>final Hello<|return|>",
        [
            said("Hm.", "analysis", R.NO_END),
            said("Hello", "final", R.NO_MESSAGE, R.NO_START),
        ],
    ),
    Case(
        "a stray <|channel|> in prose does not leak the rest into the answer",
        "<|channel|>analysis<|message|>The <|channel|> token<|end|>",
        [said("The  token", "analysis", R.STRAY_TOKEN)],
    ),
    Case(
        "<|channel|> before the end token",
        "<|channel|>final<|message|>Hello<|channel|><|return|>",
        [said("Hello", "final", R.STRAY_TOKEN)],
    ),
    Case(
        "<|message|> inside content",
        "<|channel|>final<|message|>one<|message|> two<|return|>",
        [said("one two", "final", R.STRAY_MESSAGE)],
    ),
    Case(
        "<|constrain|> inside content",
        "<|channel|>final<|message|>one<|constrain|> two<|return|>",
        [said("one two", "final", R.STRAY_TOKEN)],
    ),
    Case(
        "a special token that harmony does not use",
        "<|channel|>fi<|startoftext|>nal<|message|>one<|startoftext|> two<|return|>",
        [said("one two", "final", R.STRAY_TOKEN)],
    ),
    Case(
        "text after <|return|>",
        "<|channel|>final<|message|>Hello<|return|> and more",
        [said("Hello"), said(" and more", "final", R.AFTER_STOP, R.NO_HEADER, R.CUT)],
    ),
    Case(
        "a whole turn after <|return|>",
        "<|channel|>final<|message|>One<|return|>"
        "<|start|>assistant<|channel|>final<|message|>Two<|return|>",
        [said("One"), said("Two", "final", R.AFTER_STOP)],
    ),
    Case(
        "a newline after <|return|> is no message",
        "<|channel|>final<|message|>Hello<|return|>\n",
        [said("Hello")],
        loose=[R.AFTER_STOP, R.ABANDONED],
        tail="\n",
    ),
    Case(
        "a newline between messages",
        "<|channel|>analysis<|message|>Hm.<|end|>\n"
        "<|start|>assistant<|channel|>final<|message|>Hi<|return|>",
        [said("Hm.", "analysis"), said("Hi", "final", R.ABANDONED)],
    ),
    # Channels.
    Case(
        "an unknown channel is kept as written",
        "<|channel|>thinking<|message|>Hm.<|end|>",
        [said("Hm.", "thinking", R.UNKNOWN_CHANNEL)],
    ),
    # What no header can have: it would be refused as part of the next prompt.
    Case(
        "a channel that cannot be written is no channel",
        "<|channel|>comment.ary<|message|>Hi<|return|>",
        [said("Hi", "final", R.UNWRITABLE)],
    ),
    Case(
        "a channel that cannot be written is the known one it begins with",
        "<|channel|>analysis.<|message|>Hm.<|end|>",
        [said("Hm.", "analysis", R.UNWRITABLE)],
    ),
    Case(
        "a user's channel that cannot be written",
        "<|channel|>final<|message|>Hi<|end|><|start|>user<|channel|>a.b<|message|>More!<|end|>",
        [said("Hi"), said("More!", None, R.FOREIGN_ROLE, R.UNWRITABLE, role="user")],
    ),
    Case(
        "a recipient that cannot be written",
        "<|channel|>commentary to=functions.f!x <|constrain|>json<|message|>{}<|call|>",
        [call("{}", R.UNWRITABLE, to="functions.f_x")],
    ),
    Case(
        "a recipient with an empty part",
        "<|channel|>commentary to=a..b<|message|>{}<|call|>",
        [call("{}", R.UNWRITABLE, to="a.b", kind=None)],
    ),
    Case(
        "a recipient of which nothing can be written",
        "<|channel|>commentary to=...<|message|>{}<|call|>",
        [call("{}", R.UNWRITABLE, to=None, kind=None)],
    ),
    Case(
        "a content type that cannot be written",
        "<|channel|>final <|constrain|>text/plain<|message|>Hi<|return|>",
        [said("Hi", "final", R.UNWRITABLE)],
    ),
    Case(
        "a role with an empty name",
        "<|channel|>final<|message|>Hi<|end|><|start|>user:<|message|>More!<|end|>",
        [said("Hi"), said("More!", None, R.UNWRITABLE, R.FOREIGN_ROLE, role="user")],
    ),
    Case(
        "a tool's answer of which only the role is there",
        "<|channel|>final<|message|>Hi<|end|><|start|>tool<|message|>22<|end|>",
        [said("Hi"), said("22", None, R.NO_NAME, R.FOREIGN_ROLE, role="tool", name="tool")],
    ),
    Case(
        "<|channel|> twice",
        "<|channel|><|channel|>final<|message|>Hello<|return|>",
        [said("Hello", "final", R.NO_WORD)],
    ),
    Case(
        "two channels: the last one counts",
        "<|channel|>analysis<|channel|>final<|message|>Hello<|return|>",
        [said("Hello", "final", R.TWO_CHANNELS)],
    ),
    Case(
        "role and channel glued",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistantfinal<|message|>Hello<|return|>",
        [said("Hm.", "analysis"), said("Hello", "final", R.GLUED, R.BARE_CHANNEL)],
    ),
    Case(
        "<|channel|> spelled out",
        f" to={WEATHER}⟦channel⟧commentary <|constrain|>json<|message|>{{}}<|call|>",
        [call("{}", R.SPELLED)],
    ),
    Case(
        "a space after <|channel|>",
        "<|channel|> final<|message|>Hello<|return|>",
        [said("Hello", "final", R.SPACED)],
    ),
    Case(
        "a word too many",
        "<|channel|>final please<|message|>Hello<|return|>",
        [said("Hello", "final", R.UNKNOWN_WORD)],
    ),
    # Calls.
    Case(
        "a call on analysis",
        f"<|channel|>analysis to={WEATHER} <|constrain|>json<|message|>{{}}<|call|>",
        [call("{}", R.CALL_ON_ANALYSIS, channel="analysis")],
    ),
    Case(
        "a call on analysis, typed code",
        f"<|channel|>analysis to={WEATHER} code<|message|>{{}}<|call|>",
        [call("{}", R.CALL_ON_ANALYSIS, R.CODE_FOR_JSON, channel="analysis")],
    ),
    Case(
        "code in place of <|constrain|>json",
        f"<|channel|>commentary to={WEATHER} code<|message|>{{}}<|call|>",
        [call("{}", R.CODE_FOR_JSON)],
    ),
    Case(
        "json without <|constrain|>",
        f"<|channel|>commentary to={WEATHER} json<|message|>{{}}<|call|>",
        [call("{}", R.NO_CONSTRAIN)],
    ),
    Case(
        "<|constrain|> without a word",
        f"<|channel|>commentary to={WEATHER} <|constrain|><|message|>{{}}<|call|>",
        [call("{}", R.NO_WORD, kind=None)],
    ),
    Case(
        "the type before the recipient",
        f"<|channel|>commentary <|constrain|>json to={WEATHER}<|message|>{{}}<|call|>",
        [call("{}", R.TYPE_FIRST)],
    ),
    Case(
        "a name glued to the type",
        f"<|channel|>commentary to={WEATHER}json<|message|>{{}}<|call|>",
        [call("{}", R.GLUED, R.NO_CONSTRAIN)],
    ),
    Case(
        "a name glued to the channel",
        f" to={WEATHER}commentary <|constrain|>json<|message|>{{}}<|call|>",
        [call("{}", R.GLUED, R.BARE_CHANNEL)],
    ),
    Case(
        "the longest known name is unglued",
        "<|channel|>commentary to=functions.get_weather_forecastjson<|message|>{}<|call|>",
        [call("{}", R.GLUED, R.NO_CONSTRAIN, to="functions.get_weather_forecast")],
    ),
    Case(
        "an unknown name is left as it is",
        "<|channel|>commentary to=functions.to_json<|message|>{}<|call|>",
        [call("{}", to="functions.to_json", kind=None)],
    ),
    Case(
        "channel and type glued",
        f" to={WEATHER}<|channel|>commentaryjson<|message|>{{}}<|call|>",
        [call("{}", R.GLUED, R.NO_CONSTRAIN)],
    ),
    Case(
        "a name without its namespace",
        "<|channel|>commentary to=ping <|constrain|>json<|message|>{}<|call|>",
        [call("{}", R.NO_NAMESPACE, to="functions.ping")],
    ),
    Case(
        "a name without to=",
        f"<|channel|>commentary {WEATHER} <|constrain|>json<|message|>{{}}<|call|>",
        [call("{}", R.NO_TO)],
    ),
    Case(
        "to= without a name",
        f"<|channel|>commentary to={WEATHER} to=<|message|>{{}}<|call|>",
        [call("{}", R.UNKNOWN_WORD, kind=None)],
    ),
    Case(
        "the recipient on both sides of the channel",
        f" to={WEATHER}<|channel|>commentary to={WEATHER} <|constrain|>json<|message|>{{}}<|call|>",
        [call("{}", R.TWO_RECIPIENTS)],
    ),
    # Turns that are not the assistant's.
    Case(
        "an invented user",
        "<|channel|>final<|message|>Hi<|end|><|start|>user<|message|>More!<|end|>",
        [said("Hi"), said("More!", None, R.FOREIGN_ROLE, role="user")],
    ),
    Case(
        "a faked tool run",
        f"<|channel|>analysis<|message|>Hm.<|end|>"
        f"<|start|>{WEATHER} to=assistant<|channel|>commentary<|message|>22<|end|>",
        [
            said("Hm.", "analysis"),
            said("22", "commentary", R.FOREIGN_ROLE, role="tool", name=WEATHER, to="assistant"),
        ],
    ),
    Case(
        "a tool's answer to nobody",
        f"<|start|>{WEATHER}<|channel|>commentary<|message|>22<|end|>",
        [
            said(
                "22",
                "commentary",
                *(R.REPEATED_START, R.NO_RECIPIENT, R.FOREIGN_ROLE),
                role="tool",
                name=WEATHER,
            )
        ],
    ),
    Case(
        "a tool's answer without the tool's name",
        "<|channel|>analysis<|message|>Hm.<|end|>"
        "<|start|>tool to=assistant<|channel|>commentary<|message|>22<|end|>",
        [
            said("Hm.", "analysis"),
            said(
                "22",
                "commentary",
                *(R.NO_NAME, R.FOREIGN_ROLE),
                role="tool",
                name="tool",
                to="assistant",
            ),
        ],
    ),
    Case(
        "an unknown role is the assistant under another name",
        "<|channel|>analysis<|message|>Hm.<|end|>"
        "<|start|>narrator<|channel|>final<|message|>Hi<|return|>",
        [said("Hm.", "analysis"), said("Hi", "final", R.UNKNOWN_ROLE, name="narrator")],
    ),
    Case(
        "no role",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|><|channel|>final<|message|>Hi<|return|>",
        [said("Hm.", "analysis"), said("Hi", "final", R.NO_ROLE)],
    ),
    # Nothing, and cuts.
    Case("nothing", "", []),
    Case("only <|return|>", "<|return|>", [], loose=[R.END_IN_HEADER]),
    Case("only structure", "<|message|><|end|>", [], loose=[R.NO_CHANNEL, R.EMPTY]),
    Case(
        "an empty answer",
        "<|channel|>final<|message|><|return|>",
        [said("", "final", R.EMPTY)],
    ),
    Case(
        "cut in a header",
        "<|channel|>ana",
        [said("ana", "final", R.NO_MESSAGE, R.NO_CHANNEL, R.CUT)],
    ),
    Case("cut after a header", "<|channel|>analysis", [], loose=[R.CUT], tail="analysis"),
    Case(
        "cut in the next header",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant",
        [said("Hm.", "analysis")],
        loose=[R.CUT],
        tail="assistant",
    ),
    Case(
        "cut in thought",
        "<|channel|>analysis<|message|>Let me see",
        [said("Let me see", "analysis", R.CUT)],
    ),
    Case(
        "cut before the first word",
        "<|channel|>analysis<|message|>",
        [said("", "analysis", R.CUT, R.EMPTY)],
    ),
]
