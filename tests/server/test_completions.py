"""Raw completions: the four forms of a prompt, echo and scores, and what lm-eval relies on."""

import math

import pytest

from tests.server.conftest import events

PROMPT = "What is 12 + 30? The answer is"


def complete(server, prompt=PROMPT, **more):
    body = {"prompt": prompt, "temperature": 0, "max_tokens": 6} | more
    response = server.post("/v1/completions", body)
    assert response.status_code == 200, response.text
    return response.json()


def encoded(server, text):
    return server.post("/tokenize", {"prompt": text}).json()["tokens"]


def test_the_official_client(client):
    said = client.completions.create(model="nano", prompt=PROMPT, max_tokens=4, temperature=0)
    assert said.object == "text_completion" and said.model == "org/nano"
    assert said.choices[0].text and said.choices[0].finish_reason == "length"
    assert said.usage.completion_tokens == 4
    stream = client.completions.create(
        model="nano", prompt=PROMPT, max_tokens=4, temperature=0, stream=True
    )
    assert "".join(c.choices[0].text for c in stream) == said.choices[0].text


def test_a_prompt_in_all_four_forms(server):
    a, b = PROMPT, "Reverse the word planet."
    ids = [encoded(server, a), encoded(server, b)]
    alone = [complete(server, x)["choices"][0]["text"] for x in (a, b)]
    for prompt in ([a, b], ids):
        said = complete(server, prompt)
        assert [c["text"] for c in said["choices"]] == alone
        assert [c["index"] for c in said["choices"]] == [0, 1]
        assert said["usage"]["prompt_tokens"] == sum(map(len, ids))
    assert complete(server, ids[0])["choices"][0]["text"] == alone[0]


def test_many_prompts_wait_for_each_other(server):
    said = complete(server, [PROMPT] * 40, max_tokens=2)
    assert len(said["choices"]) == 40 and len({c["text"] for c in said["choices"]}) == 1


def test_echo_and_the_scores_of_a_prompt(server):
    ids = encoded(server, PROMPT)
    [choice] = complete(server, ids, echo=True, logprobs=2, max_tokens=1)["choices"]
    told = choice["logprobs"]
    assert choice["text"].startswith(PROMPT)
    assert len(told["tokens"]) == len(ids) + 1
    assert "".join(told["tokens"]) == choice["text"]
    assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
    assert all(p <= 0 for p in told["token_logprobs"][1:])
    for token, at in zip(told["tokens"], told["text_offset"], strict=True):
        assert choice["text"][at:].startswith(token)
    columns = (told[key][1:] for key in ("tokens", "token_logprobs", "top_logprobs"))
    for token, p, top in zip(*columns, strict=True):
        assert top[token] == p and 2 <= len(top) <= 3
    last = told["top_logprobs"][-1]
    assert max(last, key=last.get) == told["tokens"][-1], "the token drawn greedily"


def test_scores_agree_with_the_model(server):
    """As lm-eval sums them: the same numbers as drawing token by token."""
    ids = encoded(server, PROMPT)
    [drawn] = complete(server, ids[:5], logprobs=0, max_tokens=1)["choices"]
    [scored] = complete(server, ids, echo=True, logprobs=20, max_tokens=0)["choices"]
    drawn_token = drawn["logprobs"]["tokens"][0]
    top = scored["logprobs"]["top_logprobs"][5]
    assert math.isclose(top[drawn_token], drawn["logprobs"]["token_logprobs"][0], abs_tol=1e-4)


def test_nothing_is_drawn_when_a_prompt_is_only_scored(server):
    said = complete(server, echo=True, logprobs=1, max_tokens=0)
    [choice] = said["choices"]
    assert choice["text"] == PROMPT and said["usage"]["completion_tokens"] == 0
    assert "".join(choice["logprobs"]["tokens"]) == PROMPT
    assert choice["finish_reason"] == "length"


def test_streams_of_several_prompts_say_the_same(server):
    prompts = [PROMPT, "Reverse the word planet."]
    how = {"echo": True, "logprobs": 1, "n": 2}
    whole = complete(server, prompts, **how)
    body = {"prompt": prompts, "temperature": 0, "max_tokens": 6, "stream": True} | how
    chunks = events(server.post("/v1/completions", body))
    for choice in whole["choices"]:
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert "".join(c["text"] for c in mine) == choice["text"]
        assert mine[-1]["finish_reason"] == choice["finish_reason"]
        for key in ("tokens", "token_logprobs", "text_offset"):
            assert sum((c["logprobs"][key] for c in mine), []) == choice["logprobs"][key]


def test_a_stop_string_cuts_text_and_tokens(server):
    full = complete(server, max_tokens=12, logprobs=0)["choices"][0]
    stop = full["text"][6:9]
    cut = complete(server, max_tokens=12, logprobs=0, stop=stop)["choices"][0]
    assert cut["text"] == full["text"][: full["text"].index(stop)]
    assert cut["finish_reason"] == "stop"
    said = cut["logprobs"]["tokens"]
    assert said == full["logprobs"]["tokens"][: len(said)]
    assert "".join(said).startswith(cut["text"])


def test_an_answer_that_a_stop_string_ended_is_drawn_no_further(server):
    """Of two only one comes to its stop string; the other goes on."""
    how = {"n": 2, "seed": 3, "temperature": 1, "ignore_eos": True, "max_tokens": 25}
    both = [c["text"] for c in complete(server, **how)["choices"]]
    stop = next(c for c in both[0][1:] if c not in both[1])
    before = server.served.worker.stats.completion
    with server.slowly():
        said = complete(server, stop=stop, **how)["choices"]
    assert [c["text"] for c in said] == [both[0][: both[0].index(stop)], both[1]]
    assert [c["finish_reason"] for c in said] == ["stop", "length"]
    assert server.served.worker.stats.completion - before < 2 * 25


def test_the_best_of_several(server):
    how = {"temperature": 2, "seed": 3, "max_tokens": 8, "logprobs": 0}
    best = complete(server, best_of=4, **how)
    every = complete(server, n=4, **how)["choices"]

    def mean(choice):
        told = choice["logprobs"]["token_logprobs"]
        return sum(told) / len(told)

    assert mean(best["choices"][0]) >= max(map(mean, every)) - 1e-4
    assert best["usage"]["completion_tokens"] > 8


def test_special_tokens_come_as_ids_only(server):
    special = server.served.tokenizer.special("<|start|>")
    text = complete(server, "<|start|>", echo=True, logprobs=0, max_tokens=1)["choices"][0]
    ids = complete(server, [special], echo=True, logprobs=0, max_tokens=1)["choices"][0]
    assert len(text["logprobs"]["tokens"]) > 2 == len(ids["logprobs"]["tokens"])


def test_ignoring_the_end(server):
    said = complete(server, max_tokens=60, ignore_eos=True)
    assert said["usage"]["completion_tokens"] == 60
    assert said["choices"][0]["finish_reason"] == "length"


def test_what_a_remote_tokenizer_asks(server):
    with server.client() as client:
        info = client.get("/tokenizer_info").json()
        assert {"eos_token", "bos_token", "pad_token", "chat_template"} <= set(info)
        for name in ("eos_token", "bos_token"):
            asked = {"prompt": info[name], "add_special_tokens": False}
            tokens = client.post("/tokenize", json=asked).json()["tokens"]
            assert tokens == [server.served.tokenizer.special(info[name])]
        text = "naïve 漢字 <|end|>\n"
        asked = {"prompt": text, "add_special_tokens": False, "return_token_strs": True}
        said = client.post("/tokenize", json=asked).json()
        assert said["count"] == len(said["tokens"]) == len(said["token_strs"])
        assert client.post("/detokenize", json={"tokens": said["tokens"]}).json() == {
            "prompt": text
        }


@pytest.mark.parametrize(
    "more, param",
    [
        ({"suffix": "x"}, "suffix"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 3, "stream": True}, "best_of"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [1 << 30]}, "prompt"),
        ({"prompt": [[1], "x"]}, "prompt[1]"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"logprobs": 21}, "logprobs"),
        ({"use_beam_search": True}, "use_beam_search"),
    ],
)
def test_what_cannot_be_is_refused(server, more, param):
    response = server.post("/v1/completions", {"prompt": PROMPT} | more)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param, response.text
