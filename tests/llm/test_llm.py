import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import gptoss
from gptoss import LLM, Message, TokenGenerator, Tool
from gptoss.errors import ContextExceeded, GptOssError, TokenizerError
from gptoss.llm.llm import conversation
from gptoss.llm.tokens import sampled_size
from gptoss.text.tokenizer import Tokenizer
from tests.llm.toy import CONFIG, SPECIALS, damaged, play, toy_tokenizer, write_toy

ANSWER = (
    "<|channel|>analysis<|message|>Two and two.<|end|>"
    "<|start|>assistant<|channel|>final<|message|>Four, é and 漢.<|return|>"
)
CALL = (
    "<|channel|>analysis<|message|>Look.<|end|><|start|>assistant to=functions.look"
    '<|channel|>commentary <|constrain|>json<|message|>{"at": 1}<|call|>'
)


# --- chat


def test_a_reply_has_its_channels_apart(llm):
    reply = play(llm, ANSWER).chat("2+2?", temperature=0)
    assert (reply.text, reply.analysis) == ("Four, é and 漢.", "Two and two.")
    assert reply.finish_reason == "stop" and not reply.tool_calls
    assert [m.channel for m in reply.messages] == ["analysis", "final"]
    assert reply.usage.completion == len(llm.tokenizer.encode_with_specials(ANSWER))
    assert not any(m.repairs for m in reply.messages)


def test_a_call_is_a_finish_reason_and_its_answer_continues_the_turn(llm):
    look = Tool(name="look", parameters={"type": "object", "properties": {}})
    turns = [Message(role="user", content="What is there?")]
    reply = play(llm, CALL).chat(turns, tools=[look], temperature=0)
    [call] = reply.tool_calls
    assert reply.finish_reason == "tool_calls" and not reply.text
    assert (call.recipient, call.content) == ("functions.look", '{"at": 1}')
    turns += [*reply.messages, {"role": "tool", "name": "functions.look", "content": "a cat"}]
    assert play(llm, ANSWER).chat(turns, tools=[look], temperature=0).finish_reason == "stop"


def test_a_turn_that_is_cut_says_length_and_keeps_what_there_is(llm):
    reply = play(llm, ANSWER).chat("2+2?", temperature=0, max_tokens=14)
    assert (reply.text, reply.finish_reason) == ("", "length")
    assert reply.analysis == "Two and two."[: len(reply.analysis)] != ""


def test_only_analysis_is_no_answer_but_has_a_true_finish_reason(llm):
    reply = play(llm, "<|channel|>analysis<|message|>Hm.<|return|>").chat("?", temperature=0)
    assert (reply.text, reply.analysis, reply.finish_reason) == ("", "Hm.", "stop")


@pytest.mark.parametrize("said", [ANSWER, CALL, "no header at all<|return|>"])
def test_the_deltas_of_a_stream_are_the_messages_of_its_reply(llm, said):
    stream = play(llm, said).chat("?", temperature=0, stream=True)
    pieces = {}
    for delta in stream:
        pieces[delta.message_index] = pieces.get(delta.message_index, "") + delta.text
    reply = stream.reply
    assert list(pieces.values()) == [m.content for m in reply.messages]
    assert reply == play(llm, said).chat("?", temperature=0, seed=reply.seed)


@pytest.mark.parametrize("seed", range(5))
def test_the_deltas_of_noise_are_the_messages_of_its_reply_too(llm, seed):
    stream = llm.chat("?", seed=seed, max_tokens=60, stream=True)
    pieces = {}
    for delta in stream:
        pieces[delta.message_index] = pieces.get(delta.message_index, "") + delta.text
    assert [pieces.get(i, "") for i in range(len(stream.reply.messages))] == [
        m.content for m in stream.reply.messages
    ]


def test_a_stream_may_be_left_at_any_time(llm):
    stream = play(llm, ANSWER).chat("2+2?", temperature=0, stream=True)
    with pytest.raises(KeyboardInterrupt):
        for delta in stream:
            if delta.channel == "final" and "," in delta.text:
                raise KeyboardInterrupt
    reply = stream.reply
    assert (reply.text, reply.finish_reason) == ("Four,", "length")
    assert list(stream) == [] and stream.reply == reply  # the turn is over
    again = [Message(role="user", content="2+2?"), *reply.messages]
    again.append(Message(role="user", content="and?"))
    assert play(llm, ANSWER).chat(again, temperature=0).text == "Four, é and 漢."


def test_a_conversation_continued_costs_its_new_tokens_only(llm):
    turns = [Message(role="user", content="one")]
    first = llm.chat(turns, seed=1, max_tokens=8)
    assert first.usage.reused == 0
    second = llm.chat([*turns, Message(role="user", content="two")], seed=1, max_tokens=8)
    assert second.usage.reused >= first.usage.prompt - len("<|start|>assistant")


def test_thoughts_that_are_left_out_cost_no_more_than_what_is_new(llm):
    """They are longer than any window reaches back, and the next prompt leaves before them."""
    asked = {"role": "user", "content": "one"}
    first = llm.prompt(conversation([asked]))
    request = llm.tokens.request(
        first, (), seed=0, max_tokens=400, boundaries=llm.boundaries(first)
    )
    assert len(list(llm.tokens.engine.submit(request))) == 400
    turns = [
        asked,
        {"role": "assistant", "channel": "analysis", "content": "so long forgotten " * 20},
        {"role": "assistant", "channel": "final", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    second = llm.chat(turns, seed=1, max_tokens=2)
    shared = first[: len(first) - len("<|start|>assistant") + len("<|start|>") - 1]
    assert second.usage.reused == len(shared), "all but the opening of the turn"
    other = llm.chat("another", seed=1, max_tokens=2)
    assert 0 < other.usage.reused < len(shared), "the instructions are the same"


def test_ten_turns_are_as_good_as_one(llm):
    turns = []
    for i in range(10):
        turns.append(Message(role="user", content=f"turn {i}"))
        reply = play(llm, ANSWER).chat(turns, temperature=0)
        assert reply.text == "Four, é and 漢." and reply.finish_reason == "stop"
        turns += reply.messages


def test_the_same_seed_gives_the_same_reply_and_no_seed_is_told(llm):
    first = llm.chat("hi", max_tokens=12)
    assert llm.chat("hi", max_tokens=12, seed=first.seed).messages == first.messages
    assert llm.chat("hi", max_tokens=12).seed != first.seed


def test_a_reply_is_json(llm):
    import json

    facts = play(llm, CALL).chat("?", temperature=0).to_json()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["messages"][1]["recipient"] == "functions.look"


def test_two_backends_give_the_same_reply(toy):
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    replies = [
        LLM.load(toy, backend, dtype="float32").chat("hello", seed=3, max_tokens=20)
        for backend in ("reference", "torch")
    ]
    assert replies[0] == replies[1]


@pytest.mark.parametrize(
    "messages", [[{"role": "nobody", "content": ""}], [{"role": "user"}], [17], [{"rôle": "user"}]]
)
def test_a_message_that_is_none_is_a_value_error(llm, messages):
    with pytest.raises(ValueError):
        llm.chat(messages)


# --- raw text and tokens


def test_raw_text_comes_whole_or_in_pieces_without_the_end_token(llm):
    said = "naïve 漢字 <|channel|>x<|return|>"
    assert play(llm, said).generate("a", temperature=0) == "naïve 漢字 <|channel|>x"
    pieces = list(play(llm, said).generate("a", temperature=0, stream=True))
    assert "".join(pieces) == "naïve 漢字 <|channel|>x" and "字" in pieces


def test_special_tokens_count_in_raw_prompts(llm):
    seen = []
    play(llm, "x<|return|>").tokens.engine.backend.logits_of = lambda tokens: (
        seen.append(list(tokens)) or np.eye(320)[SPECIALS["<|return|>"]]
    )
    llm.generate("<|start|>hi", temperature=0)
    assert seen[0] == [SPECIALS["<|start|>"], *b"hi"]


def test_a_token_generator_yields_ids_or_pairs_stop_token_included(toy):
    generator = TokenGenerator(toy)
    ids = list(generator.generate([1, 2, 3], max_tokens=9, seed=5))
    pairs = list(generator.generate([1, 2, 3], max_tokens=9, seed=5, return_logprobs=True))
    assert [token for token, _ in pairs] == ids and all(p <= 0 for _, p in pairs)
    third = list(generator.generate([1, 2, 3], [ids[2]], max_tokens=9, seed=5))
    assert third == ids[: ids.index(ids[2]) + 1]


def test_padding_and_reserved_ids_are_never_drawn(llm):
    assert llm.tokens.engine.vocab_size == 265 < CONFIG.vocab_size
    drawn = list(llm.tokens.generate([1], stop_tokens=(), temperature=50.0, max_tokens=300, seed=0))
    assert max(drawn) < 265


def test_the_reserved_end_of_gpt_osss_vocabulary_is_never_drawn():
    assert sampled_size(Tokenizer.o200k_harmony()) == 200_013  # after <|call|>
    named = toy_tokenizer(
        SPECIALS | {"<|reserved_1|>": 265, "<|mine|>": 266, "<|reserved_2|>": 267}
    )
    assert sampled_size(named) == 267


def test_logits_serve_teacher_forcing(llm):
    tokens = list(b"teacher")
    logits = llm.logits(tokens)
    assert logits.shape == (7, CONFIG.vocab_size) and logits.dtype == np.float32
    greedy = next(llm.tokens.generate(tokens, temperature=0))
    assert greedy == int(logits[-1, :265].argmax())


# --- what does not fit


def test_a_conversation_beyond_the_context_says_both_numbers(llm):
    with pytest.raises(ContextExceeded, match=r"\d{4} tokens.*context of 2048"):
        llm.chat("x" * 3000)
    assert llm.chat("x", max_tokens=1).usage.completion == 1


def test_another_models_vocabulary_is_refused(tmp_path):
    large = toy_tokenizer(SPECIALS | {"<|far|>": 400})
    with pytest.raises(TokenizerError, match="does not match the vocabulary.*400.*320"):
        LLM.load(write_toy(tmp_path / "a", tokenizer=large))
    strange = toy_tokenizer({k: v for k, v in SPECIALS.items() if k != "<|channel|>"})
    with pytest.raises(TokenizerError, match=r"does not match.*<\|channel\|>"):
        LLM.load(write_toy(tmp_path / "b", tokenizer=strange))


def test_a_vocabulary_far_smaller_than_the_models_is_refused(tmp_path):
    with pytest.raises(TokenizerError, match="does not match the vocabulary.*265.*5000"):
        LLM.load(write_toy(tmp_path, config=replace(CONFIG, vocab_size=5000)))


def test_a_small_model_without_a_vocabulary_is_refused(tmp_path):
    path = write_toy(tmp_path)
    (path / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match="no tokenizer.json"):
        LLM.load(path)


def test_gpt_osss_own_vocabulary_serves_a_checkpoint_without_one(tmp_path):
    path = write_toy(tmp_path, config=replace(CONFIG, vocab_size=201_088, hidden_size=32))
    (path / "tokenizer.json").unlink()
    llm = LLM.load(path)
    assert llm.tokenizer.special("<|call|>") == 200_012
    assert llm.chat("Hello", max_tokens=2, seed=0).usage.prompt > 30


def test_damaged_weights_are_said_when_they_speak(tmp_path):
    with pytest.raises(GptOssError, match="NaN"):
        LLM.load(damaged(write_toy(tmp_path))).chat("hello", max_tokens=5)


# --- the front door


def test_importing_the_package_imports_next_to_nothing():
    code = (
        "import sys; before = set(sys.modules); import gptoss; "
        "new = {m for m in set(sys.modules) - before if not m.startswith('gptoss')}; "
        "print(sorted(m for m in new if m.split('.')[0] in "
        "('numpy', 'torch', 'tiktoken', 'rich', 'typer', 'ml_dtypes', 'huggingface_hub')))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(Path(gptoss.__file__).parents[1])},
    )
    assert out.stdout.strip() == "[]"


def test_every_promised_name_is_there():
    assert all(getattr(gptoss, name) is not None for name in gptoss.__all__)
    assert set(gptoss.__all__) <= set(dir(gptoss))
    with pytest.raises(AttributeError, match="nonsense"):
        gptoss.nonsense  # noqa: B018
