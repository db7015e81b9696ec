"""The seal of a connection: a tag on every message, by a key of that connection alone.

TLS keeps strangers out. The seal binds each message to its connection, its direction and its request number, so that
one that was captured at an end, and is sent again elsewhere or out of turn, or whose header was put before another
body, is refused before it is decoded. The tag is AES-GCM's over the bytes as associated data (GMAC, NIST SP 800-38D);
the client draws the key and sends it inside TLS with the call's metadata.
"""

from __future__ import annotations

import hmac
import secrets

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from noren.errors import ProtocolError

TAG = 16
KEY = 32
WRONG = "the message's tag is wrong: it was changed, or belongs to another connection"


def new_key() -> bytes:
    """Return a fresh key."""
    return secrets.token_bytes(KEY)


class Tag:
    """A tag in the making, over bytes as they come."""

    def __init__(self, key: algorithms.AES, nonce: bytes) -> None:
        self._cipher = Cipher(key, modes.GCM(nonce)).encryptor()

    def update(self, part: bytes | memoryview) -> None:
        """Take more of the message."""
        self._cipher.authenticate_additional_data(part)

    def value(self) -> bytes:
        """The tag of all that was taken. Ends it."""
        self._cipher.finalize()
        return self._cipher.tag


class Seal:
    """Makes and checks the tags at one end of a connection. Request numbers may only grow, in each direction."""

    def __init__(self, key: bytes, *, client: bool) -> None:
        if len(key) != KEY:
            raise ProtocolError(f"the connection's key has {len(key)} bytes, not {KEY}")
        self._key, self._once = algorithms.AES(key), AESGCM(key)
        self._out, self._in = (b"up..", b"down") if client else (b"down", b"up..")
        self._received = self._sent = 0

    def outgoing(self, request: int) -> Tag:
        """Begin the tag of an outgoing message. A number is used once: a nonce used twice would give the key away."""
        return Tag(self._key, self._next(request))

    def whole(self, request: int, message: bytes) -> bytes:
        """Return the tag of an outgoing message that is there as a whole; as `outgoing`, five times as fast."""
        return self._once.encrypt(self._next(request), b"", message)

    def incoming(self, request: int) -> Tag:
        """Begin the tag of an incoming message. Raises ProtocolError unless it is newer than all before."""
        return Tag(self._key, self._newer(request))

    def accept(self, request: int, tag: Tag, claimed: bytes) -> None:
        """End an incoming message. Raises ProtocolError unless its tag is right."""
        if not hmac.compare_digest(tag.value(), claimed):
            raise ProtocolError(WRONG)
        self._received = request

    def accept_whole(self, request: int, message: memoryview, claimed: memoryview) -> None:
        """Do what `incoming` and `accept` do, for a message that is there as a whole."""
        try:
            self._once.decrypt(self._newer(request), claimed, message)
        except InvalidTag:
            raise ProtocolError(WRONG) from None
        self._received = request

    def _next(self, request: int) -> bytes:
        """The nonce of an outgoing message: 96 bits, never twice under one key."""
        if request <= self._sent:
            raise ProtocolError(f"request {request} was sealed already on this connection")
        self._sent = request
        return self._out + request.to_bytes(8, "big")

    def _newer(self, request: int) -> bytes:
        """The nonce of an incoming message."""
        if request <= self._received:
            raise ProtocolError(f"request {request} came after {self._received}: a repeated or reordered message")
        return self._in + request.to_bytes(8, "big")
