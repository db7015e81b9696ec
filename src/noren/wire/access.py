"""Who may ask what: one row for each kind of message, and nothing that has no row.

A row says which roles may send the kind, and whether only on a connection that has opened a run of its own (with a
hello). A run belongs to the identity that opened it: no message can name another's.
"""

from __future__ import annotations

from dataclasses import dataclass

from noren.errors import Denied, ProtocolError
from noren.wire.identity import Role

CALLERS: frozenset[Role] = frozenset({"client", "edge"})
EVERYONE: frozenset[Role] = frozenset({"client", "edge", "server"})
NOBODY: frozenset[Role] = frozenset()


@dataclass(frozen=True, slots=True)
class Rule:
    """Who may send a kind of message to a party that serves."""

    roles: frozenset[Role]
    in_run: bool  # only after this connection's hello was accepted


TABLE: dict[str, Rule] = {
    "hello": Rule(CALLERS, in_run=False),
    "status": Rule(EVERYONE, in_run=False),
    "forward": Rule(CALLERS, in_run=True),
    "backward": Rule(CALLERS, in_run=True),
    "step": Rule(CALLERS, in_run=True),
    "enter": Rule(CALLERS, in_run=True),
    "leave": Rule(CALLERS, in_run=True),
    "average": Rule(CALLERS, in_run=True),
    "pull": Rule(CALLERS, in_run=True),
    "push": Rule(CALLERS, in_run=True),
    "close": Rule(CALLERS, in_run=True),
    "welcome": Rule(NOBODY, in_run=False),  # the rest are answers
    "condition": Rule(NOBODY, in_run=False),
    "hidden": Rule(NOBODY, in_run=False),
    "gradient": Rule(NOBODY, in_run=False),
    "state": Rule(NOBODY, in_run=False),
    "done": Rule(NOBODY, in_run=False),
    "failure": Rule(NOBODY, in_run=False),
}
"""Kind of message -> rule. A kind without a row is denied to all."""


def check(kind: str, role: Role, *, in_run: bool) -> None:
    """Raise Denied, or ProtocolError before a hello, unless a party of that role may send that kind now."""
    rule = TABLE.get(kind)
    if rule is None or role not in rule.roles:
        raise Denied(f"a party of role {role!r} may not send a {kind!r}")
    if rule.in_run and not in_run:
        raise ProtocolError(f"{kind!r} before 'hello'")
