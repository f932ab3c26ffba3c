"""Attacks, one file per paper. A new one is a file and a line in this table."""

from __future__ import annotations

from collections.abc import Mapping

# name in a grid file -> module:class
ATTACKS: Mapping[str, str] = {
    "badnet": "attacks.badnet:BadNet",
    "blended": "attacks.blended:Blended",
    "sig": "attacks.sig:Sig",
}
