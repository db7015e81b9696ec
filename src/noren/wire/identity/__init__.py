"""Who is who: a local certificate authority, and mutually authenticated TLS for gRPC.

A federation has one authority (`ca.crt` for everybody, `ca.key` for whoever issues). It issues each party a
short-lived certificate that means one thing to Noren, its URI `spiffe://<federation>/<role>/<name>`: a peer's
identity comes from there, never from a field of a message. A client's certificate opens connections, a
server's accepts them, and an edge's does both. Keys are ECDSA P-256, and readable by their owner alone.

The authority's folder keeps a record of all that it issued (`issued.jsonl`) and a list of what it revoked
(`crl.pem`). A server looks at its certificate files at every handshake and at the list beside its `ca.crt`, so that
a certificate, an authority or a revocation takes effect without a restart.

    names         what a party is called, and where it may stand    certificates  what a certificate says
    keyring       the authorities whose keys a folder holds         record        what was issued
    authority     make, issue, list, roll over                      lists         certificate revocation lists
    revocation    revoke; which serials are revoked                 credentials   what gRPC is given
    files         written whole or not at all                       clock         the time
"""

from __future__ import annotations

from noren.wire.identity.authority import create_authority, ensure, issue, listing, roll_over
from noren.wire.identity.certificates import Peer, peer_of, read_identity
from noren.wire.identity.clock import CLOCK_SKEW
from noren.wire.identity.credentials import Credentials, Insecure
from noren.wire.identity.keyring import AUTHORITY_DAYS
from noren.wire.identity.names import LEAF_DAYS, LOOPBACK, USES, Identity, Issued, Role, Use, parse_identity
from noren.wire.identity.revocation import Revocations, revoke

__all__ = [
    "AUTHORITY_DAYS",
    "CLOCK_SKEW",
    "LEAF_DAYS",
    "LOOPBACK",
    "USES",
    "Credentials",
    "Identity",
    "Insecure",
    "Issued",
    "Peer",
    "Revocations",
    "Role",
    "Use",
    "create_authority",
    "ensure",
    "issue",
    "listing",
    "parse_identity",
    "peer_of",
    "read_identity",
    "revoke",
    "roll_over",
]
