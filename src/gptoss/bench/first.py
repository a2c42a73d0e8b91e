"""``python -m gptoss.bench.first HOW``: load a model, draw a token, say what that took.

HOW is a JSON object, the arguments of ``TokenGenerator``. ``load`` starts this and has the clock.
"""

import json
import sys

from gptoss.errors import GptOssError

PROMPT = "The quick brown fox"


def main() -> None:
    """One line of JSON on stdout, or one sentence on stderr and status 1."""
    from gptoss.bench.machine import peak_memory, storage_reads
    from gptoss.llm.tokens import TokenGenerator

    try:
        model = TokenGenerator(**json.loads(sys.argv[1]))
        next(model.generate(model.tokenizer.encode(PROMPT), temperature=0.0))
    except (GptOssError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(1) from None
    seen = {"peak_memory_bytes": peak_memory(), "storage_bytes": storage_reads()}
    print(json.dumps(seen), flush=True)


if __name__ == "__main__":
    main()
