"""The kit's checkpoint and its texts are what they are said to be."""

import numpy as np

from gptoss.checkpoint.open import open_checkpoint
from gptoss.model.weights import specs
from gptoss.verify.probes import PROBE, write_probe
from tests.verify.conftest import LENGTHS


def test_the_kits_checkpoint_is_what_its_weights_say(tmp_path, probe):
    opened = open_checkpoint(write_probe(tmp_path / "probe"))
    assert opened.config == PROBE
    for spec in specs(PROBE):
        dense = probe[spec.name] if spec.kind == "dense" else probe[spec.name].decode()
        assert np.array_equal(opened.dense(spec.name), dense), spec.name


def test_a_texts_tokens_are_as_many_as_asked_and_come_back(tokenizer, asked):
    assert [len(prompt) for prompt in asked] == list(LENGTHS)
    assert all(tokenizer.encode(tokenizer.decode(prompt)) == prompt for prompt in asked)
