"""Every code of the catalog is tested on an image that triggers it and on a near miss that does not."""

from __future__ import annotations

from qcow2_forensics.audit import catalog
from tests import (
    test_account,
    test_audit_encryption,
    test_audit_history,
    test_audit_integrity,
    test_audit_provenance,
    test_audit_references,
    test_audit_residual,
)

# The tables from which these modules' tests are made: each row is run.
TABLES = (
    test_account.CASES,
    test_audit_encryption.CASES,
    test_audit_history.CASES,
    test_audit_provenance.CASES,
    test_audit_references.CASES,
    test_audit_residual.CASES,
)
BOTH = {f"QCOW2-{code}" for code in test_audit_integrity.CASES}  # rows of a trigger and a near miss
TRIGGERS = BOTH | {f"QCOW2-{code}" for table in TABLES for code, _, expected in table if expected is not None}
NEAR_MISSES = BOTH | {f"QCOW2-{code}" for table in TABLES for code, _, expected in table if expected is None}


def test_every_code_has_an_image_that_triggers_it() -> None:
    assert set(catalog()) == TRIGGERS


def test_every_code_that_is_not_always_there_has_a_near_miss() -> None:
    always = {code for code, entry in catalog().items() if entry.when == "always"}
    assert always == {"QCOW2-WRITER-PROFILE", "QCOW2-FEATURES", "QCOW2-GATEKEEPER"}
    assert set(catalog()) - always == NEAR_MISSES - always


def test_every_code_fires_at_the_severity_it_is_documented_with() -> None:
    graded = {f"QCOW2-{code}": set() for table in TABLES for code, _, _ in table}
    for table in TABLES:
        for code, _, expected in table:
            graded[f"QCOW2-{code}"].add(expected)
    never = [code for code, seen in graded.items() if catalog()[code].severity not in seen]
    assert never == []
