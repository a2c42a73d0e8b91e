"""Tools that the server runs: a live server, real tools, and a model that says what it is told."""

import json
from contextlib import ExitStack

import openai
import pytest

from gptoss import LLM
from gptoss.tools import Toolbox, kit, mcp_server
from tests.engine.scripted import Scripted
from tests.server.conftest import ASKING, WEATHER, events, running, until
from tests.tools.conftest import THINGS, needs_bwrap, sandboxes

SEARCH = '<|channel|>analysis to=browser.search code<|message|>{"query": "narwhal tusk"}<|call|>'
CODE = "<|channel|>analysis<|message|>Let me see.<|end|><|start|>assistant" + (
    "<|channel|>analysis to=python code<|message|>{}<|call|>"
)
FUNCTION = "<|channel|>commentary to=functions.{} <|constrain|>json<|message|>{}<|call|>"
FINAL = "<|channel|>final<|message|>{}<|return|>"
TUSK = FINAL.format("Three metres【1†L63】.")
QUESTION = [{"role": "user", "content": "How long is a narwhal's tusk?"}]
BROWSER, PYTHON = [{"type": "browser"}], [{"type": "python"}]


class Script:
    """A model that says the next text of a list at each request, whatever it reads."""

    def __init__(self):
        self.llm = LLM.load("nano")
        self.tokenizer = self.llm.tokenizer
        engine = self.llm.tokens.engine
        backend = Scripted(self.logits, config=self.llm.config)
        most = self.llm.plan.max_tokens
        self.llm.tokens.engine = type(engine)(
            backend, vocab_size=engine.vocab_size, max_tokens=most
        )
        self.texts, self.read, self._begun = [], [], {}

    def logits(self, tokens):
        begun = [p for p in self._begun if tuple(tokens[: len(p)]) == p]
        prompt = max(begun, key=len)
        said = self._begun[prompt]
        row = [0.0] * self.llm.config.vocab_size
        row[said[min(len(tokens) - len(prompt), len(said) - 1)]] = 50.0
        return row

    def listen(self, worker):
        submit = worker.submit

        def listening(request, *more):
            said = self.tokenizer.encode_with_specials(self.texts.pop(0))
            self._begun[tuple(request.prompt)] = said
            self.read.append(self.tokenizer.decode(request.prompt))
            return submit(request, *more)

        worker.submit = listening

    def say(self, *texts):
        self.texts, self.read = list(texts), []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents")
    lines = ["# Whales"] + [f"Line {i}." for i in range(62)]
    lines += ["The narwhal has one tusk of three metres."]
    (folder / "whales.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def script():
    return Script()


@pytest.fixture(scope="module")
def up(folder, script):
    kits = [kit(f"browser={folder}"), kit(f"apply_patch={folder}"), mcp_server(f"things={THINGS}")]
    with Toolbox(kits) as box, running(llm=script.llm, tools=box) as up:
        script.listen(up.served.worker)
        yield up


@pytest.fixture(scope="module")
def with_python():
    script = Script()
    with Toolbox([kit("python")]) as box, running(llm=script.llm, tools=box) as up:
        script.listen(up.served.worker)
        yield up, script


CLIENTS = ExitStack()


@pytest.fixture(autouse=True)
def closing():
    """A client that is only forgotten warns in somebody else's test."""
    with CLIENTS:
        yield


def client(up):
    return CLIENTS.enter_context(openai.OpenAI(base_url=up.url, api_key="none", max_retries=0))


def test_a_search_is_run_and_the_answer_comes_of_it(up, script):
    script.say(SEARCH, TUSK)
    said = up.chat(QUESTION, tools=BROWSER).json()
    [choice] = said["choices"]
    assert choice["message"]["content"] == "Three metres【1†L63】."
    assert choice["finish_reason"] == "stop" and "tool_calls" not in choice["message"]
    [ran] = choice["message"]["executed_tools"]
    assert (ran["type"], ran["name"]) == ("browser", "browser.search")
    assert "one tusk of three metres" in ran["output"]
    first, second = script.read
    assert "## browser" in first and "namespace browser {" in first
    assert second.startswith(first)
    header = "<|start|>browser.search to=assistant<|channel|>analysis<|message|>"
    assert f"{header}[0] Search results" in second and second.endswith("<|start|>assistant")


def test_usage_is_of_all_rounds(up, script):
    script.say(SEARCH, TUSK)
    spent = up.chat(QUESTION, tools=BROWSER).json()["usage"]
    rounds = [len(script.tokenizer.encode_with_specials(text)) for text in script.read]
    said = [len(script.tokenizer.encode_with_specials(text)) for text in (SEARCH, TUSK)]
    assert spent["prompt_tokens"] == sum(rounds) and spent["completion_tokens"] == sum(said)
    assert rounds[0] <= spent["prompt_tokens_details"]["cached_tokens"] + 64


def test_a_stream_tells_what_ran_and_nothing_that_the_client_would_run(up, script):
    script.say(SEARCH, TUSK)
    chunks = events(up.chat(QUESTION, tools=BROWSER, stream=True))
    deltas = [c["choices"][0]["delta"] for c in chunks]
    assert "".join(d.get("content") or "" for d in deltas) == "Three metres【1†L63】."
    [ran] = [d["executed_tools"] for d in deltas if "executed_tools" in d]
    assert ran[0]["arguments"] == '{"query": "narwhal tusk"}'
    assert not any("tool_calls" in d for d in deltas)
    assert [c["choices"][0]["finish_reason"] for c in chunks][-1] == "stop"


def test_a_failing_tool_tells_the_model_and_the_turn_goes_on(up, script):
    script.say(
        '<|channel|>analysis to=browser.open code<|message|>{"id": 7}<|call|>',
        FUNCTION.format("things_fail", "{}"),
        FUNCTION.format("things_die", "{}"),
        FUNCTION.format("things_add", '{"a": 2, "b": 3}'),
        FINAL.format("5"),
    )
    asked = [*BROWSER, {"type": "mcp", "server_label": "things"}]
    message = up.chat(QUESTION, tools=asked).json()["choices"][0]["message"]
    assert message["content"] == "5"
    outputs = [ran["output"] for ran in message["executed_tools"]]
    assert "no page is open yet" in outputs[0]
    assert "fail" in outputs[1] and "ended" in outputs[2] and outputs[3] == "5"


def test_a_patch_is_applied_in_its_folder(up, script, folder):
    patch = "*** Begin Patch\n*** Add File: new.txt\n+hello\n*** End Patch"
    call = f"<|channel|>commentary to=functions.apply_patch<|message|>{patch}<|call|>"
    script.say(call, FINAL.format("Done."))
    message = up.chat(QUESTION, tools=[{"type": "apply_patch"}]).json()["choices"][0]["message"]
    assert (folder / "new.txt").read_text() == "hello\n" and message["content"] == "Done."
    assert "type apply_patch = (_: string) => any;" in script.read[0]


def test_the_model_must_answer_when_it_has_called_often_enough(up, script):
    script.say(SEARCH, TUSK)
    response = client(up).responses.create(
        input="How long?", tools=[{"type": "web_search"}], max_tool_calls=1
    )
    assert response.status == "completed" and response.output_text == "Three metres【1†L63】."
    [ran] = [item for item in response.output if item.type == "web_search_call"]
    assert ran.action.query == "narwhal tusk" and ran.status == "completed"


def test_a_model_that_would_call_on_can_not(up, script):
    script.say(SEARCH, SEARCH)
    response = client(up).responses.create(
        input="?", tools=[{"type": "web_search"}], max_tool_calls=1, max_output_tokens=150
    )
    assert [item.type for item in response.output].count("web_search_call") == 1


def test_the_limit_of_tokens_is_of_all_rounds(up, script):
    script.say(*[SEARCH] * 9)
    response = client(up).responses.create(
        input="How long?", tools=[{"type": "web_search"}], max_output_tokens=60
    )
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.usage.output_tokens <= 60 and len(script.texts) < 8
    one = len(script.tokenizer.encode_with_specials(SEARCH))
    script.say(SEARCH)
    response = client(up).responses.create(
        input="How long?", tools=[{"type": "web_search"}], max_output_tokens=one
    )
    assert response.status == "incomplete" and response.usage.output_tokens == one
    assert [(i.type, i.status) for i in response.output] == [("web_search_call", "completed")]


def test_what_ran_before_a_call_of_the_client_is_read_again_behind_its_result(up, script):
    script.say(SEARCH, FUNCTION.format("get_weather", '{"city": "Paris"}'))
    tools = [*BROWSER, WEATHER]
    message = up.chat(ASKING, tools=tools).json()["choices"][0]["message"]
    [call] = message["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    result = {"role": "tool", "tool_call_id": call["id"], "content": "rain"}
    for kept in (message, {k: v for k, v in message.items() if not k.startswith("reasoning")}):
        script.say(FINAL.format("It rains."))
        up.chat([*ASKING, kept, result], tools=tools)
        [read] = script.read
        assert "one tusk of three metres" in read and read.count("narwhal tusk") == 2
        assert read.index("three metres") < read.index("to=functions.get_weather")


def test_a_stored_response_keeps_what_ran(up, script):
    flat = {"type": "function", **WEATHER["function"]}
    tools = [{"type": "web_search"}, flat]
    script.say(SEARCH, FUNCTION.format("get_weather", '{"city": "Paris"}'), FINAL.format("Rain."))
    api = client(up)
    first = api.responses.create(input="Weather?", tools=tools)
    assert [item.type for item in first.output] == ["web_search_call", "function_call"]
    assert api.responses.retrieve(first.id).output == first.output
    up.served.thoughts._kept.clear()  # as after a restart
    result = {
        "type": "function_call_output",
        "call_id": first.output[1].call_id,
        "output": "rain",
    }
    api.responses.create(input=[result], previous_response_id=first.id, tools=tools)
    assert script.read[2].startswith(script.read[1]), "the model reads its own words again"
    script.say(FINAL.format("Rain."))
    items = [item.to_dict() for item in first.output]
    whole = [{"role": "user", "content": "Weather?"}, *items, result]
    api.responses.create(input=whole, tools=tools)
    assert "one tusk of three metres" in script.read[0]


def test_events_of_calls_have_the_names_that_clients_know(up, script):
    script.say(SEARCH, FUNCTION.format("things_add", '{"a": 2, "b": 3}'), FINAL.format("5"))
    tools = [{"type": "web_search"}, {"type": "mcp", "server_label": "things"}]
    with client(up).responses.create(input="2+3?", tools=tools, stream=True) as stream:
        told = [event for event in stream]
    assert [event.sequence_number for event in told] == list(range(len(told)))
    names = [event.type.removeprefix("response.") for event in told]
    assert names[2:6] == [
        "output_item.added",
        "web_search_call.in_progress",
        "web_search_call.searching",
        "web_search_call.completed",
    ]
    at = names.index("mcp_call.in_progress")
    assert names[at - 1] == "output_item.added" and names[at + 1] == "mcp_call_arguments.delta"
    rest = [n for n in names[at:] if n.startswith("mcp_call")]
    assert rest[-2:] == ["mcp_call_arguments.done", "mcp_call.completed"]
    search, added, message = told[-1].response.output
    assert search.action.type == "search" and message.content[0].text == "5"
    assert (added.server_label, added.name, added.output) == ("things", "things_add", "5")
    assert json.loads(added.arguments) == {"a": 2, "b": 3}


@pytest.mark.parametrize(
    "tool, told",
    [
        ({"type": "python"}, "(gptoss serve --tool python)"),
        ({"type": "code_interpreter", "container": {"type": "auto"}}, "it runs browser, apply"),
        ({"type": "mcp", "server_label": "nix"}, "gptoss serve --mcp NAME=COMMAND"),
        ({"type": "mcp", "server_label": "things", "server_url": "http://a/"}, "not followed"),
        ({"type": "mcp"}, "needs a server_label"),
        ({"type": "mcp", "server_label": "things", "require_approval": "always"}, "say never"),
        ({"type": "mcp", "server_label": "things", "allowed_tools": ["add"]}, "or none"),
    ],
)
def test_what_is_not_switched_on_is_refused(up, tool, told):
    for path, body in (
        ("/v1/chat/completions", {"messages": QUESTION}),
        ("/v1/responses", {"input": "?"}),
    ):
        response = up.post(path, body | {"tools": [tool]})
        assert response.status_code == 400, response.text
        assert told in response.json()["error"]["message"]
        assert response.json()["error"]["param"] == "tools"


def test_names_and_numbers_that_cannot_be_are_refused(up):
    mine = {"type": "function", "function": {"name": "apply_patch"}}
    for more in ({"tools": [mine, {"type": "apply_patch"}]}, {"tools": BROWSER, "n": 2}):
        response = up.chat(QUESTION, **more)
        assert response.status_code == 400 and "param" in response.json()["error"]


def test_a_call_that_is_followed_by_the_answer_is_not_run(up, script):
    script.say(SEARCH.replace("<|call|>", "<|end|><|start|>assistant") + FINAL.format("Hm."))
    api = client(up)
    response = api.responses.create(input="?", tools=[{"type": "web_search"}])
    assert [(i.type, i.status) for i in response.output] == [
        ("web_search_call", "incomplete"),
        ("message", "completed"),
    ]
    script.say(SEARCH.replace("<|call|>", "<|end|><|start|>assistant") + FINAL.format("Hm."))
    [choice] = up.chat(QUESTION, tools=BROWSER).json()["choices"]
    assert choice["finish_reason"] == "stop" and choice["message"]["content"] == "Hm."


def test_tools_that_nobody_asked_for_are_not_told_of(up, script):
    script.say(FINAL.format("Hi."))
    up.chat(QUESTION)
    assert "namespace" not in script.read[0] and "# Tools" not in script.read[0]


@needs_bwrap
def test_code_keeps_its_names_from_round_to_round_and_no_longer(with_python):
    up, script = with_python
    script.say(CODE.format("x = 6"), CODE.format("x * 7"), FINAL.format("42"))
    response = client(up).responses.create(
        input="6 x 7?", tools=[{"type": "code_interpreter", "container": {"type": "auto"}}]
    )
    assert [item.type for item in response.output] == [
        *("reasoning", "code_interpreter_call", "reasoning", "code_interpreter_call", "message")
    ]
    assert response.output[3].code == "x * 7" and response.output[3].outputs[0].logs == "42\n"
    assert response.tools[0].type == "code_interpreter"
    script.say(CODE.format("x"), FINAL.format("?"))
    response = client(up).responses.create(input="x?", tools=PYTHON)
    assert "NameError" in response.output[1].outputs[0].logs


@needs_bwrap
def test_events_of_code(with_python):
    up, script = with_python
    script.say(CODE.format("1 + 1"), FINAL.format("2"))
    with client(up).responses.create(input="1+1?", tools=PYTHON, stream=True) as stream:
        told = [event.type.removeprefix("response.") for event in stream]
    told = [name for name in dict.fromkeys(told) if "code_interpreter" in name]
    assert told == [
        "code_interpreter_call.in_progress",
        "code_interpreter_call_code.delta",
        "code_interpreter_call_code.done",
        "code_interpreter_call.interpreting",
        "code_interpreter_call.completed",
    ]


@needs_bwrap
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
def test_who_hangs_up_ends_the_code_too(with_python, path):
    up, script = with_python
    until(lambda: not sandboxes())
    script.say(CODE.format("while True: pass"))
    body = {"messages": QUESTION, "input": "?", "tools": PYTHON, "stream": True}
    body.pop("input" if "chat" in path else "messages")
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: {up.base.removeprefix('http://')}\r\n"
    head += "content-type: application/json\r\n"
    with up.connect() as raw:
        raw.sendall(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
        until(sandboxes)
    until(lambda: not sandboxes())
    assert up.idle()


def test_of_two_servers_one_is_allowed(up, script):
    script.say(TUSK)
    labels = [{"type": "mcp", "server_label": name} for name in ("things", "apply_patch")]
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": labels[:1]}
    body = {"input": "?", "tools": labels, "tool_choice": allowed}
    assert up.post("/v1/responses", body).status_code == 200
    assert "type things_add = " in script.read[0] and "type apply_patch = " not in script.read[0]
