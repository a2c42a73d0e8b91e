"""A model that learned harmony, held to forms it never saw: prompt in, answer out."""

import json

import jsonschema
import pytest

from gptoss.backends import load_backend
from gptoss.checkpoint.open import open_checkpoint
from gptoss.engine import Engine, Request
from gptoss.grammar import JsonSchema, Regex, constrain
from gptoss.llm.llm import conversation
from gptoss.llm.models import NANO
from gptoss.text import harmony
from gptoss.text.messages import Tool
from gptoss.text.tokenizer import Tokenizer
from tests.grammar.conftest import read

SUM = {
    "type": "object",
    "properties": {"sum": {"type": "integer"}, "even": {"type": "boolean"}},
    "required": ["sum", "even"],
    "additionalProperties": False,
}
ADD = Tool(name="add", parameters=SUM, strict=True)


@pytest.fixture(scope="module")
def words():
    return Tokenizer.from_file(NANO / "tokenizer.json")


@pytest.fixture(scope="module")
def engine(words):
    checkpoint = open_checkpoint(NANO)
    backend = load_backend("reference", checkpoint.config, checkpoint.read)
    return Engine(backend, vocab_size=words.vocab_size, max_tokens=2048)


@pytest.mark.usefixtures("untried")
@pytest.mark.parametrize(
    "asked, speculate",
    [
        ({"format": JsonSchema(SUM)}, False),
        ({"format": JsonSchema(SUM)}, True),
        ({"format": Regex(r"The sum is [0-9]{1,4}\.")}, True),
        ({"tools": [ADD], "choice": "required"}, True),
    ],
)
def test_the_model_says_what_was_asked_in_the_form_asked(words, engine, asked, speculate):
    tools = asked.get("tools", ())
    turns = conversation("What is 17 + 25?", effort="low", tools=tools)
    prompt = harmony.render_for_completion(turns, words)
    request = Request(
        prompt=prompt,
        constraint=constrain(words, **asked),
        stop_tokens=words.stop_tokens,
        max_tokens=300,
        speculate=speculate,
    )
    drawn = [d.token for d in engine.submit(request)]
    last = read(drawn, words, tools)[-1]
    match asked.get("format"):
        case JsonSchema(schema):
            jsonschema.validate(json.loads(last.content), schema)
        case Regex():
            assert last.content.startswith("The sum is ") and last.content.endswith(".")
        case None:
            assert last.recipient == "functions.add"
            jsonschema.validate(json.loads(last.content), SUM)
    assert drawn[-1] == words.special("<|call|>" if tools else "<|return|>")
    print(words.decode(drawn))
