"""Compiling a stranger's grammar where it can be stopped: in a process with limits of its own.

llguidance counts its steps almost everywhere, but not where it intersects regexes, and what is
being compiled cannot be interrupted. As a script, this file is that process: it reads
``{"grammars": [...], ...}`` and writes what is wrong with them, or nothing.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

SECONDS = 3  # of the processor
PATIENCE = 60.0  # seconds of the clock, where the processor's are not counted or somebody waits
MEMORY = 1 << 30  # bytes of address space, the interpreter's included


def trial(grammars: Sequence[str], specials: Sequence[str]) -> str:
    """What is wrong with one of the grammars, as a sentence; "" if they compile within bounds.

    Raises GrammarError where that cannot be told this time.
    """
    from gptoss.errors import GrammarError  # here, for the other process knows no package

    asked = json.dumps({"grammars": list(grammars), "specials": list(specials), "seconds": SECONDS})
    command = [sys.executable, "-P", __file__]
    try:
        ran = subprocess.run(command, input=asked.encode(), capture_output=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        raise GrammarError(
            f"the grammar did not compile within {PATIENCE:.0f} seconds; make it simpler"
        ) from None
    except OSError as error:
        raise GrammarError(f"the grammar could not be tried: {error.strerror}") from None
    if ran.returncode > 0 and b"MemoryError" not in ran.stderr:
        why = ran.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise GrammarError(f"the grammar could not be tried: {' '.join(why)[:200]}")
    if ran.returncode:  # a signal: the processor's time, or memory that could not be had
        bounds = f"{SECONDS} seconds and {MEMORY >> 20} MiB"
        return f"the grammar did not compile within {bounds}; make it simpler"
    return ran.stdout.decode()


def sentence(raw: str) -> str:
    """The compiler's message without its excerpts: the first line, and a regex's own complaint."""
    lines = [line.strip() for line in raw.splitlines()] or [""]
    said = lines[0].split("failed to compile JSON schema: ")[-1]
    if "Stop" in said or said.startswith("NoExtension"):
        said = "no text at all satisfies it"
    if inner := next((line for line in lines[1:] if line.startswith("error: ")), None):
        said = f"{said.rstrip(':')}: {inner.removeprefix('error: ')}"
    return said[:240]


def limits() -> Any:
    """Of llguidance's work on one grammar, when it compiles and at every token."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        max_items_in_row=2_000,
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=200_000,  # some 15 ms
        step_max_items=50_000,  # some 3 ms
        max_lexer_states=20_000,  # 1 to 2 kB each
        max_grammar_size=200_000,
        verbose_errors=False,  # they would repeat the grammar
    )


def vocabulary(tokens: Sequence[bytes], specials: Sequence[int], end: int, encode: Any) -> Any:
    """A vocabulary in llguidance's form; ``end`` is a special token that no grammar names."""
    from llguidance import LLTokenizer, TokenizerWrapper

    class Words:
        """What TokenizerWrapper expects."""

        eos_token_id, bos_token_id, special_token_ids = end, None, list(specials)

        def __call__(self, text: str) -> list[int]:
            return list(encode(text))

    words = Words()
    words.tokens = tokens  # type: ignore[attr-defined]
    return LLTokenizer(TokenizerWrapper(words))


def _fault(text: str, table: Any) -> str:
    """Compile, and look for a first token."""
    from llguidance import LLMatcher

    matcher = LLMatcher(table, text, log_level=0, limits=limits())
    if not matcher.is_error():
        matcher.compute_bitmask()
    return sentence(matcher.get_error()) if matcher.is_error() else ""


def _main() -> None:
    asked = json.load(sys.stdin)
    with suppress(ImportError):  # Windows
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (asked["seconds"],) * 2)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    specials = [name.encode() for name in asked["specials"]]
    tokens = [bytes([b]) for b in range(256)] + specials
    ids = range(256, len(tokens))
    table = vocabulary(tokens, ids, ids[-1], lambda text: text.encode())
    print(next(filter(None, (_fault(text, table) for text in asked["grammars"])), ""), end="")


if __name__ == "__main__":
    _main()
