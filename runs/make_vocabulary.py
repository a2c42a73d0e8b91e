"""Rebuild src/gptoss/assets/o200k.xz from the npm package js-tiktoken.

    npm pack js-tiktoken@1.0.21 && tar xzf js-tiktoken-1.0.21.tgz
    python runs/make_vocabulary.py package/dist/ranks/o200k_base.js src/gptoss/assets/o200k.xz

Writes nothing unless the rank file it reads back has the SHA-256 of the original.
"""

import base64
import hashlib
import json
import lzma
import sys
from pathlib import Path

from gptoss.text.vocabulary import O200K_SHA256, unpack_ranks


def main(source: Path, target: Path) -> None:
    """The module's ranks, one line "! <first rank> <base64> <base64> ...", packed for the wheel."""
    module = source.read_text(encoding="utf-8").strip()
    listing = json.loads(module.removeprefix("export default ").removesuffix(";"))["bpe_ranks"]
    tokens: list[bytes] = []
    for line in filter(None, listing.split("\n")):
        _, first, *words = line.split(" ")
        assert int(first) == len(tokens), f"ranks skip from {len(tokens)} to {first}"
        tokens += map(base64.b64decode, words)

    rows = (b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))
    found = hashlib.sha256(b"".join(rows)).hexdigest()
    if found != O200K_SHA256:
        sys.exit(f"{source}: the rank file's SHA-256 would be {found}, expected {O200K_SHA256}")

    # Lengths before bytes: xz finds the text easier to predict without numbers in between.
    packed = bytes(map(len, tokens)) + b"".join(tokens)
    assert list(unpack_ranks(packed)) == tokens
    target.write_bytes(lzma.compress(packed, preset=9 | lzma.PRESET_EXTREME))
    print(f"{target}: {target.stat().st_size:,} bytes")
    print(f"O200K_PACKED_SHA256 = {hashlib.sha256(packed).hexdigest()}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
