import math

import pytest

from gptoss.engine import Request
from gptoss.engine.request import MOST_ROWS


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"min_tokens": -1},
        {"min_tokens": 5, "max_tokens": 4},
        {"seed": -1},
        {"seed": 2**64},
        {"boundaries": [0]},
        {"boundaries": [1, 4]},
        {"n": 0},
        {"n": MOST_ROWS + 1},
        {"best_of": 1, "n": 2},
        {"beams": 1, "n": 2},
        {"beams": -1},
        {"beams": MOST_ROWS + 1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.nan},
        {"frequency_penalty": math.inf},
        {"presence_penalty": math.nan},
        {"length_penalty": math.nan},
        {"logit_bias": {1: math.nan}},
        {"logit_bias": {1: math.inf}},
        {"logprobs": -1},
        {"prompt_logprobs": -1},
        {"timeout": -0.1},
        {"timeout": math.nan},
    ],
    ids=str,
)
def test_a_request_that_cannot_be_names_the_field(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Request(prompt=[1, 2, 3], **wrong)


def test_no_prompt_is_no_request():
    with pytest.raises(ValueError, match="the prompt is empty"):
        Request(prompt=[])


def test_beams_are_not_drawn():
    with pytest.raises(ValueError, match="best_of and beams"):
        Request(prompt=[1], beams=2, best_of=2)


def test_a_request_keeps_no_list_of_its_callers():
    prompt = [1, 2, 3]
    request = Request(prompt=prompt, boundaries=[3, 1, 3])
    prompt.append(4)
    assert request.prompt == (1, 2, 3) and request.boundaries == (1, 3)
