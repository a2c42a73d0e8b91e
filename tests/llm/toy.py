"""A checkpoint of random weights with a vocabulary of bytes, and scripts to play on it."""

from gptoss.checkpoint.open import open_checkpoint
from gptoss.checkpoint.synthesize import synthesize
from gptoss.model.config import ModelConfig
from gptoss.text.tokenizer import Tokenizer
from tests.engine.scripted import Scripted

NAMES = [
    "startoftext",
    "endoftext",
    "return",
    "constrain",
    "channel",
    "start",
    "end",
    "message",
    "call",
]
SPECIALS = {f"<|{name}|>": 256 + i for i, name in enumerate(NAMES)}
CONFIG = ModelConfig(
    num_hidden_layers=2,
    hidden_size=64,
    vocab_size=320,  # the last 55 are padding
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    num_experts=4,
    experts_per_token=2,
    intermediate_size=64,
    sliding_window=32,
    initial_context_length=256,
    rope_scaling_factor=8.0,
)


def toy_tokenizer(specials=SPECIALS):
    return Tokenizer({bytes([i]): i for i in range(256)}, specials)


def write_toy(folder, *, config=CONFIG, tokenizer=None, layout="huggingface"):
    """A checkpoint in ``folder / toy``."""
    folder.mkdir(exist_ok=True)
    path = folder / "words.json"
    (tokenizer or toy_tokenizer()).save(path)
    return synthesize(config, folder / "toy", layout, tokenizer_path=path)


def play(llm, text):
    """From now on, whatever it is asked, the model says ``text`` (specials count)."""
    script, start = llm.tokenizer.encode_with_specials(text), {}

    def logits_of(tokens):
        begin = start.setdefault("at", len(tokens))
        row = [0.0] * llm.config.vocab_size
        row[script[min(len(tokens) - begin, len(script) - 1)]] = 50.0
        return row

    backend = Scripted(logits_of, config=llm.config)
    llm.tokens.engine = type(llm.tokens.engine)(
        backend, vocab_size=llm.tokens.engine.vocab_size, max_tokens=llm.plan.max_tokens
    )
    return llm


def without_specials(path):
    """The same checkpoint, talking for ever: at temperature 0 no special token is likeliest."""
    head = open_checkpoint(path).tensors["lm_head.weight"]
    with head.path.open("r+b") as file:
        file.seek(head.offset + 256 * 2 * CONFIG.hidden_size)
        file.write(bytes(9 * 2 * CONFIG.hidden_size))
    return path


def damaged(path):
    """The same checkpoint with NaN in its embedding."""
    table = open_checkpoint(path).tensors["model.embed_tokens.weight"]
    with table.path.open("r+b") as file:
        file.seek(table.offset)
        file.write(b"\xff" * table.nbytes)
    return path
