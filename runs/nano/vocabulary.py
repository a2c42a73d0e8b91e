"""The nano model's vocabulary: bytes, the frequent words of its conversations, harmony's specials.

Byte-level BPE of the same kind as o200k, with one liberty: a word is joined letter by letter from
its beginning (``" c"``, ``" co"``, ...), and only words that begin with a space or a capital are
joined at all. So a word the vocabulary does not know falls apart into letters, which is what a
model wants that counts and reverses them; digits always stand alone.
"""

import random
from collections import Counter

import regex

from gptoss.text import harmony
from gptoss.text.tokenizer import O200K_PATTERN, Tokenizer
from runs.nano import tasks

SPECIALS = (
    "<|startoftext|> <|endoftext|> <|return|> <|constrain|> <|channel|> <|start|> <|end|> "
    "<|message|> <|call|>"
).split()
JOINED = regex.compile(r"( ?[A-Z]?[a-z]+|[\s\p{P}]+| [+<>=-]+)")


def build(examples: int = 6000, seed: int = 0) -> Tokenizer:
    """The vocabulary of ``examples`` conversations; the same for the same arguments."""
    rng = random.Random(seed)
    plain = Tokenizer(
        {bytes([b]): b for b in range(256)},
        {name: 256 + i for i, name in enumerate(SPECIALS)},
    )
    counts: Counter[str] = Counter()
    for _ in range(examples):
        drawn = tasks.example(rng)
        ids = harmony.render([*drawn.prompt, *drawn.turn], plain, keep_analysis=True)
        for text in regex.split(r"<\|[a-z]+\|>", plain.decode(ids)):
            counts.update(regex.findall(O200K_PATTERN, text))
    words = [
        word
        for word, n in counts.items()
        if n >= examples // 100 and JOINED.fullmatch(word) and not word[0].islower()
    ]
    chains = {word.encode()[:end] for word in words for end in range(2, len(word.encode()) + 1)}
    ranks = {bytes([b]): b for b in range(256)}
    ranks |= {t: 256 + i for i, t in enumerate(sorted(chains, key=lambda t: (len(t), t)))}
    return Tokenizer(ranks, {name: len(ranks) + i for i, name in enumerate(SPECIALS)})


def starts(tokenizer: Tokenizer) -> list[str]:
    """Beginnings of words that the vocabulary joins to the space before them."""
    pieces = [tokenizer.decode([i]) for i in range(256, tokenizer.vocab_size)]
    return sorted({p[1:].lower() for p in pieces if p[:1] == " " and p[1:].isalpha()})
