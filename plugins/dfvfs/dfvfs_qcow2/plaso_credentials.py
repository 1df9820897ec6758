"""Credentials given to log2timeline open what is locked inside images in file systems, in every worker process.

plaso gives workers the credentials of the volumes that its own scan unlocked. An image in a file system is scanned
later, by one worker, and what is found in it is processed by any of them: so all of them get what the user gave.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from dfvfs.credentials import manager
from dfvfs.helpers import source_scanner
from dfvfs.lib import definitions
from dfvfs.resolver import context, resolver

from .later_states import FAILURES
from .names import image_name

Credential = tuple[str, Any]  # its kind, as in --credential, and the secret

_tried: set[str] = set()  # path specifications of locked volumes; each is tried once in a process


def add_to_configuration(stock_method: Any, tool: Any) -> Any:
    """Add what the user gave, as an option or when asked, to the configuration that goes to the workers."""
    configuration = stock_method(tool)
    given = [*tool._credentials, *((item.credential_type, item.credential_data) for item in configuration.credentials)]
    configuration.extraction.qcow_credentials = list(dict.fromkeys(given))
    return configuration


def take_from_configuration(stock_method: Any, worker: Any, configuration: Any) -> None:
    """Keep the credentials where the worker's other settings are."""
    stock_method(worker, configuration)
    worker.qcow_credentials = list(getattr(configuration, "qcow_credentials", ()))


def credentials_of(worker: Any) -> list[Credential]:
    """Return the credentials that a worker was given."""
    return list(getattr(worker, "qcow_credentials", ()))


def process_path_spec(stock_method: Any, process: Any, worker: Any, mediator: Any, path_spec: Any) -> None:
    """Unlock what a path specification leads through, then let the worker process what it means."""
    unlock(path_spec, credentials_of(worker))
    stock_method(process, worker, mediator, path_spec)


def unlock(path_spec: Any, credentials: Sequence[Credential]) -> None:
    """Put the credentials that open the volumes around a path specification, from an inner image on, into the key chain."""
    if not credentials:
        return
    for step in reversed(list(_inside_an_inner_image(path_spec))):
        if step.comparable in _tried or resolver.Resolver.key_chain.GetCredentials(step):
            continue
        _tried.add(step.comparable)
        with suppress(*FAILURES):
            _try(step, credentials)


def _inside_an_inner_image(path_spec: Any) -> Iterator[Any]:
    """Yield what can be locked, innermost first, up to the outermost image that is itself inside something."""
    steps = []
    while path_spec is not None:
        steps.append(path_spec)
        path_spec = path_spec.parent
    images = [
        number
        for number, step in enumerate(steps)
        if step.type_indicator == definitions.TYPE_INDICATOR_QCOW and image_name(step)
    ]
    if images:
        lockable = definitions.TYPE_INDICATORS_WITH_ENCRYPTION_SUPPORT
        yield from (step for step in steps[: images[-1] + 1] if step.type_indicator in lockable)


def _try(step: Any, credentials: Iterable[Credential]) -> None:
    kinds = manager.CredentialsManager.GetCredentials(step).CREDENTIALS
    for kind, data in credentials:
        if kind not in kinds:
            continue
        scan_context = source_scanner.SourceScannerContext()
        scan_context.AddScanNode(step, None)
        scan_context.LockScanNode(step)
        # The libraries open a volume with the first password that it is given, or never: each try has its own objects.
        scanner = source_scanner.SourceScanner(resolver_context=context.Context())
        with suppress(*FAILURES):
            if scanner.Unlock(scan_context, step, kind, data):
                return
