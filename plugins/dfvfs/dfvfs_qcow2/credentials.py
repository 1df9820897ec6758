"""QCOW images can be locked: LUKS and the legacy AES method, both opened by a passphrase."""

from __future__ import annotations

from typing import Any

from dfvfs.credentials import credentials, manager
from dfvfs.lib import definitions

_Stock: Any = credentials.Credentials


class QCOWCredentials(_Stock):
    """What unlocks a QCOW image."""

    CREDENTIALS = frozenset(["password"])
    TYPE_INDICATOR = definitions.TYPE_INDICATOR_QCOW


def register() -> None:
    """Register the credentials, and name QCOW among the types that can be encrypted."""
    known = manager.CredentialsManager._credentials
    if definitions.TYPE_INDICATOR_QCOW not in known:
        manager.CredentialsManager.RegisterCredentials(QCOWCredentials())
    # The scanner looks the name up at each call.
    definitions.TYPE_INDICATORS_WITH_ENCRYPTION_SUPPORT |= {definitions.TYPE_INDICATOR_QCOW}


register()
