"""Every byte of every view of the evidence case has the SHA-256 that QEMU's own export has."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

import qcow2_forensics as q
from tests.conftest import EvidenceCase


def _sha256(source: Any) -> str:
    digest, at = hashlib.sha256(), 0
    while data := source.read(at, 1 << 20):
        digest.update(data)
        at += len(data)
    return digest.hexdigest()


@pytest.mark.parametrize("state", ["active", "before-incident", "during-incident"])
def test_a_disk_state_is_what_qemu_converts(evidence: EvidenceCase, state: str) -> None:
    with q.open_disk(evidence.image, None if state == "active" else state) as disk:
        assert disk.size == evidence.truth["virtual_size"]
        assert _sha256(disk) == evidence.truth["disk"][state]


@pytest.mark.parametrize("state", ["before-incident", "during-incident"])
def test_a_vm_state_is_the_stream_qemu_stored(evidence: EvidenceCase, state: str) -> None:
    with q.open_vm_state(evidence.image, state) as stream:
        assert stream.size == evidence.truth["vm_state"][state]["size"]
        assert _sha256(stream) == evidence.truth["vm_state"][state]["sha256"]


def test_the_latest_memory_is_taken_when_none_is_named(evidence: EvidenceCase) -> None:
    with q.open_vm_state(evidence.image) as stream:
        assert stream.snapshot.name == "during-incident"
