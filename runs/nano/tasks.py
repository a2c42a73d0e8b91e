"""What the nano model learns: small problems whose answers can be checked, worked out in writing.

Every example is a harmony conversation. The last turn is the model's: an analysis whose length
follows the reasoning effort (low: the bare steps; medium: the steps named; high: the steps named,
then checked another way), then the answer. An analysis begins by writing the problem down in a
fixed width, so that every later step finds its digits at the same distance.

Problems are drawn from a ``random.Random``; a problem belongs to the held-out set if a hash of its
question's numbers or words says so, so that training never sees one, under any wording.
"""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass

from gptoss.text.messages import Developer, Effort, Message, System, Tool

EFFORTS: tuple[Effort, ...] = ("low", "medium", "high")
PLACES = ("ones", "tens", "hundreds")


@dataclass(frozen=True)
class Example:
    """One conversation and the turn that is right."""

    task: str
    effort: Effort
    prompt: list[Message]  # up to the model's turn
    turn: list[Message]  # the model's turn, tool results included
    key: str  # what makes two problems the same


@dataclass(frozen=True)
class Problem:
    """A question, its worked solutions by effort, and the reply they lead to."""

    question: str
    analysis: dict[str, str]
    reply: str
    key: str


def held_out(key: str) -> bool:
    """One problem in sixteen is kept for the examination, but none about a word of ``KNOWN``."""
    return not key.startswith("known") and hashlib.sha256(key.encode()).digest()[0] % 16 == 0


# --- arithmetic ---------------------------------------------------------------------------------


def number(rng: random.Random) -> int:
    """0 to 999, short numbers as often as one meets them."""
    return rng.randrange(10 ** rng.choice((1, 2, 2, 3, 3, 3)))


def columns(a: int, b: int) -> list[tuple[str, int, int]]:
    """(place, digit of a, digit of b) from the right."""
    pairs = zip(f"{a:03}"[::-1], f"{b:03}"[::-1], strict=True)
    return [(place, int(x), int(y)) for place, (x, y) in zip(PLACES, pairs, strict=True)]


def sum_steps(a: int, b: int) -> tuple[str, str]:
    """Column addition, bare and named."""
    bare, named, carry = [], [], 0
    for place, x, y in columns(a, b):
        total = x + y + carry
        step = f"{x}+{y}{'+1' if carry else ''}={total}"
        carry = total // 10
        bare.append(step)
        named.append(f"{place} {step}" + (" carry 1" if carry else ""))
    return " ".join(bare), ", ".join(named)


def difference_steps(a: int, b: int) -> tuple[str, str]:
    """Column subtraction for a >= b, bare and named."""
    bare, named, borrow = [], [], 0
    for place, x, y in columns(a, b):
        less = x < y + borrow
        step = f"{x + 10 * less}-{y}{'-1' if borrow else ''}={x + 10 * less - y - borrow}"
        borrow = int(less)
        bare.append(step)
        named.append(f"{place} {step}" + (" borrow 1" if borrow else ""))
    return " ".join(bare), ", ".join(named)


def add(rng: random.Random) -> Problem:
    """a + b."""
    a, b = number(rng), number(rng)
    question = rng.choice(
        ("What is {a} + {b}?", "{a}+{b}", "{a} + {b}", "Add {a} and {b}.", "What is {a} plus {b}?")
        + ("Compute {a} + {b}.", "{a} + {b} = ?", "What is the sum of {a} and {b}?")
    ).format(a=a, b=b)
    bare, named = sum_steps(a, b)
    analysis = {
        "low": f"{a:03}+{b:03}: {bare}",
        "medium": f"{a:03}+{b:03} by columns: {named}. So {a + b}.",
        "high": f"{a:03}+{b:03} by columns: {named}. So {a + b}. "
        f"Check {b:03}+{a:03}: {sum_steps(b, a)[1]}. Again {a + b}.",
    }
    return Problem(question, analysis, f"{a} + {b} = {a + b}", f"add {min(a, b)} {max(a, b)}")


def subtract(rng: random.Random) -> Problem:
    """a - b, which may be negative."""
    a, b = number(rng), number(rng)
    if rng.random() < 0.75:
        a, b = max(a, b), min(a, b)
    question = rng.choice(
        ("What is {a} - {b}?", "{a}-{b}", "{a} - {b}", "Subtract {b} from {a}.", "{a} - {b} = ?")
        + ("What is {a} minus {b}?", "Compute {a} - {b}.")
        + ("What is the difference of {a} and {b}?",)
    ).format(a=a, b=b)
    big, small = max(a, b), min(a, b)
    bare, named = difference_steps(big, small)
    swap = f"{a:03}-{b:03} is minus " if a < b else ""
    named = f"{swap}{big:03}-{small:03} by columns: {named}. So {a - b}."
    check = (
        f"Check {big - small:03}+{small:03}: {sum_steps(big - small, small)[1]}. So {big}, good."
    )
    analysis = {
        "low": f"{swap}{big:03}-{small:03}: {bare}",
        "medium": named,
        "high": f"{named} {check}",
    }
    return Problem(question, analysis, f"{a} - {b} = {a - b}", f"sub {a} {b}")


def compare(rng: random.Random) -> Problem:
    """Which of two numbers is larger, or smaller."""
    a = number(rng)
    near = (rng.choice((a + rng.randint(-9, 9), a + 10 * rng.randint(-9, 9))), number(rng))
    b = max(0, min(999, rng.choice(near)))
    word = rng.choice(("larger", "smaller"))
    question = rng.choice(
        (
            "Which is {w}, {a} or {b}?",
            "Which number is {w}: {a} or {b}?",
            "{a} or {b}, which is {w}?",
        )
    ).format(w=word, a=a, b=b)
    steps: list[str] = []
    for place, x, y in reversed(columns(a, b)):
        sign = "=" if x == y else "<" if x < y else ">"
        steps.append(f"{place} {x}{sign}{y}")
        if x != y:
            break
    big, small = max(a, b), min(a, b)
    pick = big if word == "larger" else small
    reply = "They are equal." if a == b else f"{pick} is {word}."
    order = f"{big:03}{'=' if a == b else '>'}{small:03}"
    found = f"{order}, {'equal' if a == b else f'{word} {pick:03}'}"
    named = f"{a:03} and {b:03} from the left: {', '.join(steps)}. So {found}."
    analysis = {
        "low": f"{a:03} and {b:03}: {' '.join(s.split()[1] for s in steps)} so {found}",
        "medium": named,
        "high": f"{named} Check the other way: {b:03} and {a:03}, {order}, good. So {found}.",
    }
    return Problem(question, analysis, reply, f"cmp {small} {big}")


def sort(rng: random.Random) -> Problem:
    """Three or four numbers in order, by taking the smallest again and again."""
    numbers = [rng.randrange(10 ** rng.choice((1, 2))) for _ in range(rng.randint(3, 4))]
    down = rng.random() < 0.3
    order = rng.choice(
        (" from largest to smallest",) if down else ("", " from smallest to largest")
    )
    shown = rng.choice((", ", " ")).join(map(str, numbers))
    question = rng.choice(
        ("Sort {s}{o}.", "Sort these numbers{o}: {s}", "Sort the numbers {s}{o}.")
    )
    question = question.format(s=shown, o=order)
    word, best_of = ("largest", max) if down else ("smallest", min)
    in_order = sorted(numbers, reverse=down)
    # Four places of two digits, whatever is there: xx is a place without a number.
    left = [f"{n:02}" for n in numbers] + ["xx"] * (4 - len(numbers))
    steps = []
    for _ in numbers:
        along = ["xx"]  # the best so far, place by place
        for n in left:
            along.append(
                n if along[-1] == "xx" else along[-1] if n == "xx" else best_of(n, along[-1])
            )
        steps.append((" ".join(left), " ".join(along[1:])))
        left[left.index(along[-1])] = "xx"
    reply = ", ".join(map(str, in_order))
    named = "".join(f"{rest}: {word} {along}. " for rest, along in steps) + "All taken."
    sign = ">" if down else "<"
    pairs = zip(in_order, in_order[1:], strict=False)
    check = ", ".join(f"{a:02} {'=' if a == b else sign} {b:02}" for a, b in pairs)
    analysis = {
        "low": f"{word}: " + ", ".join(f"{rest}: {along}" for rest, along in steps),
        "medium": named,
        "high": f"{named} Check: {check}, good.",
    }
    return Problem(question, analysis, reply, f"sort {down} {numbers}")


# --- letters ------------------------------------------------------------------------------------

WORDS = (
    "apple banana cherry garden window planet yellow purple orange silver golden flower summer "
    "winter spring autumn animal monkey rabbit turtle kitten puppy horse mouse tiger "
    "lemon melon grape peach river ocean mountain valley forest desert island bridge castle tower "
    "bottle basket pencil paper music guitar piano violin drum dance happy strawberry blueberry "
    "coffee cookie butter cheese bread water sugar pepper salad pizza pasta noodle cloud thunder "
    "rain snow storm star moon comet rocket engine wheel train plane boat ship anchor harbor "
    "street market school teacher student doctor nurse farmer baker king queen knight dragon "
    "wizard magic mirror candle lantern pillow blanket carpet table chair door house room kitchen "
    "cat dog bird fish frog bee ant fox wolf bear lion deer goose duck hen cow pig sheep goat"
).split()
KNOWN: list[str] = []  # words that are one token; vocabulary.py fills it


def word(rng: random.Random) -> str:
    """A real word, or one that might have been, of at most ten letters."""
    kind = rng.random()
    if kind < 0.3:
        return rng.choice(WORDS)
    if KNOWN and kind < 0.4:
        return rng.choice(KNOWN)
    syllables = "".join(
        rng.choice("bcdfghjklmnpqrstvwxyz")
        + rng.choice(("a", "e", "i", "o", "u", "ee", "oo", "ar"))
        for _ in range(rng.randint(1, 3))
    )
    ending = rng.choice(("", "", "n", "t", "r", "s", "l", "y", "tt", "rr"))
    scrambled = "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(3, 10)))
    made = rng.choice((syllables + ending, scrambled))
    return made[:10] if len(made) >= 3 else made + "ing"


def about(text: str) -> str:
    """How the key of a problem about this word begins."""
    return f"known {text}" if text in KNOWN else text


def quoted(rng: random.Random, text: str) -> str:
    """The word, in quotes or not."""
    return rng.choice((text, f'"{text}"', f"'{text}'"))


def numbered(text: str) -> str:
    """p1l2a3..."""
    return "".join(f"{letter}{i}" for i, letter in enumerate(text, 1))


def reverse(rng: random.Random) -> Problem:
    """A word backwards."""
    text = word(rng)
    question = rng.choice(
        (
            "Reverse {w}",
            "Reverse the word {w}.",
            "Reverse the letters of {w}.",
            "Spell {w} backwards.",
        )
        + ("What is {w} backwards?", "Write {w} backwards.")
    ).format(w=quoted(rng, text))
    letters = numbered(text)
    back = "".join(f"{text[i - 1]}{i}" for i in range(len(text), 0, -1))
    named = f"{text} has the letters {letters}. Backwards: {back}."
    analysis = {
        "low": f"{text}: {letters}",
        "medium": named,
        "high": f"{named} Check: {len(text)} letters, from the front again: {letters}, good.",
    }
    return Problem(question, analysis, text[::-1], f"{about(text)} reversed")


def count(rng: random.Random) -> Problem:
    """How often a letter occurs."""
    text = word(rng)
    if rng.random() < 0.4:  # more of one letter than chance gives
        at = rng.randrange(len(text))
        text = (text[:at] + rng.choice(text) + text[at:])[:10]
    letter = rng.choice(text) if rng.random() < 0.8 else rng.choice("aeinorstu")
    question = rng.choice(
        ("How many times does the letter {c} occur in {w}?", "Count the letter {c} in {w}.")
        + ("How many {c} are in {w}?", "How many times is {c} in {w}?")
    ).format(c=rng.choice((letter, f'"{letter}"')), w=quoted(rng, text))
    n, steps = 0, []
    for x in text:
        n += x == letter
        steps.append(f"{x}{n}")
    times = "once" if n == 1 else f"{n} times"
    reply = f"The letter {letter} occurs {times} in {text}."
    places = [str(i) for i, x in enumerate(text, 1) if x == letter]
    along = "".join(steps)
    named = f"{text} with {letter} counted along: {along}. So {n}."
    found = f"at {' '.join(places)}" if places else "nowhere"
    analysis = {
        "low": f"{text} {letter}: {along}",
        "medium": named,
        "high": f"{named} Check: {numbered(text)}. Found {letter} {found}, so {n}, good.",
    }
    return Problem(question, analysis, reply, f"{about(text)} counting {letter}")


# --- talk ---------------------------------------------------------------------------------------

CAN = "I can add, subtract, compare and sort numbers, and reverse words and count their letters."
TALK = (
    (("Hello", "Hello!", "Hi", "Hi!", "Hello there", "Good day", "Hey"),
     "The user says hello.", f"Hello! {CAN}"),
    (("Who are you?", "What are you?", "What is your name?", "Tell me about yourself."),
     "The user asks who I am.",
     "I am nano, a very small gpt-oss model. I live inside the gptoss package."),
    (("What can you do?", "Help", "Help me", "What do you know?", "How can you help me?"),
     "The user asks what I can do.", CAN),
    (("How big are you?", "How many parameters do you have?", "How large are you?"),
     "The user asks how big I am.",
     "I have about two million parameters, in 4 layers with 8 experts each."),
    (("Who made you?", "Who trained you?", "Where do you come from?"),
     "The user asks who made me.",
     "I was trained from nothing by the recipe in the gptoss package, on a plain CPU."),
    (("How are you?", "How are you today?", "Are you well?"),
     "The user asks how I am.", "I am well, thank you. Give me two numbers to add!"),
    (("Thanks", "Thank you!", "Thanks!", "Thank you"),
     "The user thanks me.", "You are welcome!"),
    (("Bye", "Goodbye!", "Bye!", "See you"), "The user says goodbye.", "Goodbye!"),
    (("Are you ChatGPT?", "Are you a big model?", "Are you human?", "Are you real?"),
     "The user asks what I am.",
     "No, I am nano, a very small gpt-oss model. I live inside the gptoss package."),
)  # fmt: skip
UNKNOWN = f"I am too small to answer that. {CAN}"


def talk(rng: random.Random) -> Problem:
    """Small talk about itself."""
    i = rng.randrange(len(TALK))
    questions, thought, reply = TALK[i]
    analysis = {
        "low": thought,
        "medium": f"{thought} I answer in one line.",
        "high": f"{thought} No numbers and no letters to work on. I answer in one line, and I am "
        "kind.",
    }
    return Problem(rng.choice(questions), analysis, reply, f"talk {i}")


def unknown(rng: random.Random) -> Problem:
    """What it cannot do, it says."""
    made = " ".join(rng.choice((word(rng), rng.choice(WORDS))) for _ in range(rng.randint(1, 4)))
    city, item = rng.choice(CITIES), rng.choice(ITEMS)
    question = rng.choice(
        (f"Write a poem about {made}.", f"What is the capital of {made}?", f"Why is the {made}?")
        + (f"What is the weather in {city}?", f"What time is it in {city}?", f"Explain {made}.")
        + (f"What is the price of a {item}?", f"Tell me about {made}.", f"{made}?")
    )
    analysis = {
        "low": "I can not do that.",
        "medium": "The user asks for something else. I can not do that.",
        "high": "The user asks for something else. No numbers and no letters to work on, and no "
        "tool for it. I can not do that.",
    }
    return Problem(question, analysis, UNKNOWN, f"unk {question}")


# --- tools --------------------------------------------------------------------------------------

CITIES = (
    "Paris London Berlin Madrid Rome Oslo Vienna Tokyo Delhi Cairo Lima Boston Dublin Athens "
    "Prague Lisbon Warsaw Zurich Milan Geneva Bern Kyoto Seoul Quito Havana Nairobi Dakar "
    "Porto Turin Lyon"
).split()
ITEMS = tuple(w for w in WORDS if w not in ("rain", "snow", "storm", "happy", "yellow", "purple"))
SKIES = ("sunny", "cloudy", "rainy", "windy", "foggy")


def _tool(name: str, description: str, argument: str, what: str) -> Tool:
    schema = {"type": "string", "description": what}
    parameters = {"type": "object", "properties": {argument: schema}, "required": [argument]}
    return Tool(name=name, description=description, parameters=parameters)


WEATHER = _tool("get_weather", "Get the weather in a city.", "city", "The city.")
CLOCK = _tool("get_time", "Get the time in a city.", "city", "The city.")
PRICE = _tool("get_price", "Get the price of an item.", "item", "The item.")
TOOLS = (WEATHER, CLOCK, PRICE)


def city_name(rng: random.Random) -> str:
    """A city, or what might be one: arguments are to be copied, not remembered."""
    return rng.choice(CITIES) if rng.random() < 0.4 else word(rng).capitalize()


def tool_call(rng: random.Random, effort: Effort) -> tuple[Tool, str, list[Message], str]:
    """(the tool that is needed, question, the model's turn, key)."""
    tool = rng.choice(TOOLS)
    if tool is PRICE:
        thing, price = rng.choice((rng.choice(ITEMS), word(rng))), rng.randrange(1, 100)
        question = rng.choice(
            ("What is the price of a {x}?", "How much is a {x}?", "What does a {x} cost?")
        )
        result, reply = f'{{"price": {price}}}', f"A {thing} costs {price} euros."
    else:
        thing = city_name(rng)
        if tool is WEATHER:
            degrees, sky = rng.randrange(1, 40), rng.choice(SKIES)
            question = rng.choice(
                ("What is the weather in {x}?", "How is the weather in {x}?", "Weather in {x}?")
                + ("What is the weather like in {x}?",)
            )
            result = f'{{"degrees": {degrees}, "sky": "{sky}"}}'
            reply = f"It is {degrees} degrees and {sky} in {thing}."
        else:
            time = f"{rng.randrange(24):02}:{rng.randrange(60):02}"
            question = rng.choice(("What time is it in {x}?", "What is the time in {x}?"))
            result, reply = f'{{"time": "{time}"}}', f"It is {time} in {thing}."
    assert tool.parameters is not None
    argument = tool.parameters["required"][0]
    name = f"functions.{tool.name}"
    thought = {
        "low": f"Call {tool.name}.",
        "medium": f"The user asks for something I can look up. Call {tool.name}.",
        "high": f"The user asks for something I can look up. There is a tool for it: {tool.name}. "
        f"It takes the {argument}, which is {thing}. Call {tool.name}.",
    }[effort]
    turn = [
        Message(role="assistant", channel="analysis", content=thought),
        Message(
            role="assistant",
            channel="commentary",
            recipient=name,
            content_type="json",
            content=f'{{"{argument}": "{thing}"}}',
        ),
        Message(
            role="tool", name=name, recipient="assistant", channel="commentary", content=result
        ),
        Message(role="assistant", channel="final", content=reply),
    ]
    return tool, question.format(x=thing), turn, f"{about(thing.lower())} for {tool.name}"


# --- conversations ------------------------------------------------------------------------------

SOLVABLE: dict[str, Callable[[random.Random], Problem]] = {
    "add": add,
    "subtract": subtract,
    "compare": compare,
    "sort": sort,
    "reverse": reverse,
    "count": count,
    "talk": talk,
    "unknown": unknown,
}
SHARES = {"add": 10, "subtract": 16, "compare": 12, "sort": 18, "reverse": 15, "count": 17}
SHARES |= {"talk": 4, "unknown": 3, "tool": 9}
SEEN_IN_TRAINING = ("talk", "unknown")  # nothing to hold out: the point is the wording


def opening(rng: random.Random, effort: Effort, tools: list[Tool]) -> list[Message]:
    """The system message, and a developer message where there is something to say."""
    date = f"20{rng.randrange(24, 36)}-{rng.randrange(1, 13):02}-{rng.randrange(1, 29):02}"
    system = System(effort=effort, current_date=rng.choice((date, date, None)))
    messages = [Message(role="system", content=system)]
    if tools:
        messages.append(Message(role="developer", content=Developer(tools=tools)))
    return messages


def history(rng: random.Random) -> list[Message]:
    """An earlier exchange, as harmony keeps it: without its analysis."""
    while True:
        problem = SOLVABLE[rng.choice(("add", "subtract", "compare", "reverse", "talk"))](rng)
        if not held_out(problem.key):
            break
    return [
        Message(role="user", content=problem.question),
        Message(role="assistant", channel="final", content=problem.reply),
    ]


def example(
    rng: random.Random,
    *,
    task: str | None = None,
    effort: Effort | None = None,
    exam: bool = False,
    bare: bool = False,
) -> Example:
    """One conversation. ``exam`` draws only held-out problems, training only the others.

    ``bare`` leaves out the system message and earlier turns: from these it learns to copy first.
    """
    task = task or rng.choices(list(SHARES), list(SHARES.values()))[0]
    effort = effort or ("medium" if bare else rng.choices(EFFORTS, (3, 3, 2))[0])
    while True:
        tools: list[Tool] = []
        if task == "tool":
            tool, question, turn, key = tool_call(rng, effort)
            tools = [tool] if rng.random() < 0.6 else rng.sample(TOOLS, len(TOOLS))
        else:
            problem = SOLVABLE[task](rng)
            question, key = problem.question, problem.key
            turn = [
                Message(role="assistant", channel="analysis", content=problem.analysis[effort]),
                Message(role="assistant", channel="final", content=problem.reply),
            ]
            if task != "unknown" and rng.random() < 0.08:
                tools = rng.sample(TOOLS, rng.randint(1, len(TOOLS)))
        if task in SEEN_IN_TRAINING or held_out(key) == exam:
            break
    prompt = opening(rng, effort, tools)
    for _ in range(rng.choice((0, 0, 0, 0, 0, 0, 1, 2))):
        prompt += history(rng)
    if bare:
        prompt = [message for message in prompt if message.role == "developer"]
    prompt.append(Message(role="user", content=question))
    return Example(task, effort, prompt, turn, key)
