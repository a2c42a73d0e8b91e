"""Clients that others wrote, unmodified. Each is skipped where it is not installed.

None of them is among the package's test dependencies: install what you want to try beside it,
`pip install openai-agents litellm langchain-openai llm 'lm-eval[api]'`, and run with `-m slow`.
"""

import asyncio
import gc
import json
import os
import subprocess
import sys
import warnings

import openai
import pytest

from tests.server.conftest import WEATHER

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # what others warn of is theirs
]

SUM = "What is 247 + 385?"
REVERSE = "Reverse the word planet."
ASKED = "What is the weather in Paris?"
ANSWER = '{"degrees": 21, "sky": "sunny"}'


@pytest.fixture(scope="module", autouse=True)
def swept():
    """What a library leaves open is collected here, where nobody minds."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()


def installed(name, distribution):
    return pytest.importorskip(
        name, reason=f"{distribution} is not installed.", exc_type=ModuleNotFoundError
    )


def user(text):
    return [{"role": "user", "content": text}]


def told(text):
    return "21" in text and "sunny" in text and "Paris" in text


# ------------------------------------------------------------------ openai-agents


@pytest.fixture(params=["responses", "chat"])
def agent(request, server):
    """Runs an agent that may ask for the weather, and tells for which cities it did."""
    agents = installed("agents", "openai-agents")
    agents.set_tracing_disabled(True)
    kind = {
        "responses": agents.OpenAIResponsesModel,
        "chat": agents.OpenAIChatCompletionsModel,
    }[request.param]
    cities = []

    @agents.function_tool
    def get_weather(city: str) -> str:
        """Get the weather in a city."""
        cities.append(city)
        return ANSWER

    def go(talk):
        async def main():
            async with openai.AsyncOpenAI(base_url=server.url, api_key="none") as client:
                model = kind(model="nano", openai_client=client)
                how = agents.ModelSettings(temperature=0, include_usage=True)
                nano = agents.Agent("nano", model=model, model_settings=how, tools=[get_weather])
                return await talk(agents.Runner, nano)

        return asyncio.run(main())

    return go, cities


def test_agents_go_through_a_tool_loop(agent):
    go, cities = agent
    result = go(lambda runner, nano: runner.run(nano, ASKED))
    assert cities == ["Paris"] and told(result.final_output)
    usage = result.context_wrapper.usage
    assert usage.requests == 2 and usage.output_tokens > 0


def test_agents_stream_a_tool_loop(agent):
    go, cities = agent

    async def talk(runner, nano):
        result = runner.run_streamed(nano, ASKED)
        return result, [event async for event in result.stream_events()]

    result, events = go(talk)
    assert cities == ["Paris"] and told(result.final_output)
    items = [e.item.type for e in events if e.type == "run_item_stream_event"]
    seen = [i for i in items if i != "reasoning_item"]
    assert seen == ["tool_call_item", "tool_call_output_item", "message_output_item"]
    deltas = [e.data for e in events if e.type == "raw_response_event"]
    text = "".join(d.delta for d in deltas if d.type == "response.output_text.delta")
    assert text == result.final_output


def test_agents_talk_over_turns(agent):
    go, _ = agent

    async def talk(runner, nano):
        first = await runner.run(nano, ASKED)
        return await runner.run(nano, [*first.to_input_list(), *user(SUM)])

    assert "632" in go(talk).final_output


# ------------------------------------------------------------------ litellm


@pytest.fixture
def litellm(server, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks GitHub
    library = installed("litellm", "litellm")
    how = {"model": "openai/nano", "api_base": server.url, "api_key": "none", "temperature": 0}
    return library, how


def test_litellm_completes(litellm):
    library, how = litellm
    answer = library.completion(messages=user(SUM), **how)
    message = answer.choices[0].message
    assert "632" in message.content and message.reasoning_content
    assert answer.usage.completion_tokens_details.reasoning_tokens > 0


def test_litellm_streams(litellm):
    library, how = litellm
    chunks = list(
        library.completion(
            messages=user(REVERSE), stream=True, stream_options={"include_usage": True}, **how
        )
    )
    said = [c.choices[0].delta for c in chunks if c.choices]
    assert "tenalp" in "".join(d.content or "" for d in said)
    assert "".join(getattr(d, "reasoning_content", None) or "" for d in said)
    assert chunks[-1].usage.completion_tokens > 0


@pytest.mark.parametrize("stream", [False, True])
def test_litellm_calls_a_tool(litellm, stream):
    library, how = litellm
    asked = library.completion(messages=user(ASKED), tools=[WEATHER], stream=stream, **how)
    if stream:
        asked = library.stream_chunk_builder(list(asked), messages=user(ASKED))
    message = asked.choices[0].message
    [call] = message.tool_calls
    assert asked.choices[0].finish_reason == "tool_calls"
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    result = {"role": "tool", "tool_call_id": call.id, "content": ANSWER}
    talk = [*user(ASKED), message.model_dump(), result]
    answer = library.completion(messages=talk, tools=[WEATHER], **how)
    assert told(answer.choices[0].message.content)


@pytest.mark.parametrize("stream", [False, True])
def test_litellm_speaks_responses(litellm, stream):
    library, how = litellm
    answer = library.responses(input=SUM, stream=stream, **how)
    if stream:
        answer = list(answer)[-1].response
    assert "632" in answer.output_text and answer.status == "completed"


def test_litellm_completes_raw_text(litellm):
    library, how = litellm
    answer = library.text_completion(
        prompt="What is", max_tokens=4, **how | {"model": "text-completion-openai/nano"}
    )
    assert answer.choices[0].text and answer.usage.completion_tokens == 4


def test_litellm_knows_the_errors(litellm):
    library, how = litellm
    with pytest.raises(library.NotFoundError):
        library.completion(messages=user(SUM), **how | {"model": "openai/other"})
    with pytest.raises(library.BadRequestError):
        library.completion(messages=user("word " * 4000), **how)


# ------------------------------------------------------------------ langchain


@pytest.fixture(params=[False, True], ids=["chat", "responses"])
def langchain(request, server):
    library = installed("langchain_openai", "langchain-openai")
    return library.ChatOpenAI(
        model="nano",
        base_url=server.url,
        api_key="none",
        temperature=0,
        max_retries=0,
        stream_usage=True,
        use_responses_api=request.param,
    )


def test_langchain_asks(langchain):
    answer = langchain.invoke(SUM)
    assert "632" in answer.text and answer.usage_metadata["output_tokens"] > 0


def test_langchain_streams(langchain):
    chunks = list(langchain.stream(REVERSE))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole = whole + chunk
    assert len(chunks) > 3 and "tenalp" in whole.text
    assert whole.usage_metadata["output_tokens"] > 0


@pytest.mark.parametrize("stream", [False, True])
def test_langchain_goes_through_a_tool_loop(langchain, stream):
    from langchain_core.messages import HumanMessage
    from langchain_core.tools import tool

    @tool
    def get_weather(city: str) -> str:
        """Get the weather in a city."""
        return ANSWER

    def ask(talk):
        if not stream:
            return model.invoke(talk)
        whole, *chunks = model.stream(talk)
        for chunk in chunks:
            whole = whole + chunk
        return whole

    model = langchain.bind_tools([get_weather])
    talk = [HumanMessage(ASKED)]
    talk.append(ask(talk))
    [call] = talk[-1].tool_calls
    assert call["name"] == "get_weather" and call["args"] == {"city": "Paris"}
    talk.append(get_weather.invoke(call))
    assert told(ask(talk).text)


def test_langchain_gets_structure(langchain):
    schema = {
        "title": "sum",
        "description": "A sum.",
        "type": "object",
        "properties": {"result": {"type": "integer"}},
        "required": ["result"],
        "additionalProperties": False,
    }
    model = langchain.with_structured_output(schema, method="json_schema")
    assert isinstance(model.invoke(SUM)["result"], int)


# ------------------------------------------------------------------ llm


def run(command, folder, **more):
    """A program of this interpreter's environment, with its own empty home and no hub."""
    environment = os.environ | {"HOME": str(folder), "HF_HUB_OFFLINE": "1"} | more
    ran = subprocess.run(
        [sys.executable, *command],
        env=environment,
        cwd=folder,
        timeout=240,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-4000:]
    return ran.stdout


@pytest.fixture
def llm(server, tmp_path):
    installed("llm", "llm")
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- {{model_id: small, model_name: nano, api_base: '{server.url}', supports_tools: true}}\n"
    )

    def ask(*arguments):
        command = ["-m", "llm", *arguments]
        return run(command, tmp_path, LLM_USER_PATH=str(tmp_path))

    return ask


@pytest.mark.parametrize("stream", [[], ["--no-stream"]], ids=["stream", "whole"])
def test_llm_asks(llm, stream):
    assert "632" in llm("prompt", "-m", "small", "-o", "temperature", "0", *stream, SUM)
    assert "tenalp" in llm("prompt", "-m", "small", "-o", "temperature", "0", *stream, REVERSE)


@pytest.mark.parametrize("stream", [[], ["--no-stream"]], ids=["stream", "whole"])
def test_llm_goes_through_a_tool_loop(llm, stream):
    function = f'''
def get_weather(city: str) -> str:
    """Get the weather in a city."""
    return {ANSWER!r}
'''
    options = ["-m", "small", "-o", "temperature", "0", "--functions", function]
    assert told(llm("prompt", *options, *stream, ASKED))


# ------------------------------------------------------------------ lm-eval

COMMON = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
CANDIDATES = ["632", "tenalp", "19"]
CHOICES = f"""
output_type: multiple_choice
doc_to_choice: {json.dumps(CANDIDATES)}
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""
WRITTEN = """
output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n\\n"], do_sample: false, temperature: 0, max_gen_toks: 400}
process_results: !function check.right
metric_list: [{metric: right, aggregation: mean, higher_is_better: true}]
"""
CHECK = """
def right(doc, results):
    return {"right": float(doc["answer"] in results[0])}
"""


def score(server, question, choice):
    """The log-probability of a choice behind its question, summed over its tokens."""
    body = {"model": "nano", "prompt": f"{question} {choice}", "max_tokens": 0}
    how = {"echo": True, "logprobs": 1, "temperature": 0}
    scored = server.post("/v1/completions", body | how).json()["choices"][0]["logprobs"]
    places = zip(scored["text_offset"], scored["token_logprobs"], strict=True)
    return sum(value for offset, value in places if offset >= len(question))


@pytest.fixture
def evaluate(server, tmp_path):
    installed("lm_eval", "lm-eval")
    installed("tenacity", "lm-eval[api]")
    rows = [{"question": SUM, "answer": "632"}, {"question": REVERSE, "answer": "tenalp"}]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "check.py").write_text(CHECK)
    for name, rest in {"choices": CHOICES, "written": WRITTEN}.items():
        (tmp_path / f"{name}.yaml").write_text(COMMON.format(name=name, data=data) + rest)

    def go(model, path, task, *more, **how):
        how = {"model": "nano", "base_url": server.url + path, "max_retries": 1} | how
        command = ["-m", "lm_eval", "--model", model, "--tasks", task, *more]
        command += ["--model_args", ",".join(f"{k}={v}" for k, v in how.items())]
        command += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
        run([*command, "--log_samples"], tmp_path)
        [results] = (tmp_path / "out").rglob("results_*.json")
        [samples] = (tmp_path / "out").rglob(f"samples_{task}_*.jsonl")
        lines = [json.loads(line) for line in samples.read_text().splitlines()]
        return json.loads(results.read_text())["results"][task], lines

    return go


def test_lm_eval_scores_choices(evaluate, server):
    """With its remote tokenizer; the scores are those of the whole text, asked for at once."""
    how = {"tokenizer_backend": "remote", "num_concurrent": 2}
    results, samples = evaluate("local-completions", "/completions", "choices", **how)
    assert 0 <= results["acc,none"] <= 1 and len(samples) == 2
    for sample in samples:
        for choice, (scored, _) in zip(CANDIDATES, sample["filtered_resps"], strict=True):
            assert float(scored) == pytest.approx(score(server, sample["doc"]["question"], choice))


def test_lm_eval_reads_what_is_written(evaluate):
    where = ("local-chat-completions", "/chat/completions")
    results, samples = evaluate(*where, "written", "--apply_chat_template")
    assert results["right,none"] == 1, samples


def test_lm_eval_reads_what_is_completed(evaluate):
    how = {"tokenizer_backend": "remote"}
    _, samples = evaluate("local-completions", "/completions", "written", **how)
    assert len(samples) == 2
