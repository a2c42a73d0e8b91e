"""The nano model's vocabulary: bytes, the frequent words of its conversations, harmony's specials.

Byte-level, of the same kind as o200k, with one liberty: a word is a token only as a whole
(``ignore_merges`` in Hugging Face's file), never a part of a longer one. So a word the vocabulary
does not know falls apart into letters, which is what a model wants that counts and reverses them;
digits always stand alone.
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
JOINED = regex.compile(r"[ _.=][A-Z]?[a-z]{2,}|[A-Za-z][a-z]{2,}|[\s\p{P}]{2,}| [+<>=-]+")
# Never one token: what is to be read letter by letter, and the mark of an empty place in a list.
SPELLED = {word for text in (*tasks.WORDS, *tasks.CITIES) for word in (text, text.capitalize())}
SPELLED.add("xx")


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
        word.encode()
        for word, n in counts.items()
        if n >= examples // 100 and JOINED.fullmatch(word) and word.strip() not in SPELLED
    ]
    ranks = {bytes([b]): b for b in range(256)}
    ranks |= {t: 256 + i for i, t in enumerate(sorted(words, key=lambda t: (len(t), t)))}
    return Tokenizer(ranks, {name: len(ranks) + i for i, name in enumerate(SPECIALS)})


def known(tokenizer: Tokenizer) -> list[str]:
    """Words of three to ten letters that are one token, alone or after a space."""
    pieces = (tokenizer.decode([i]) for i in range(256, tokenizer.vocab_size))
    return sorted({p.strip() for p in pieces if regex.fullmatch(" ?[a-z]{3,10}", p)})
