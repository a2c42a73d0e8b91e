"""Who may come in: whoever says one of the keys."""

import hmac
from collections.abc import Iterable
from hashlib import sha256


class Keys:
    """Compares in constant time; without any key, all may."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._digests = [_digest(key.encode("utf-8", "surrogateescape")) for key in keys if key]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def fit(self, authorization: bytes | None) -> bool:
        """Whether the header ``Authorization: Bearer KEY`` says one."""
        if not self._digests:
            return True
        scheme, _, key = (authorization or b"").partition(b" ")
        said = _digest(key.strip())
        found = [hmac.compare_digest(said, digest) for digest in self._digests]
        return scheme.lower() == b"bearer" and any(found)


def _digest(key: bytes) -> bytes:
    return sha256(key).digest()
