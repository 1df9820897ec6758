"""Tests of qcow2-forensics: one file per subject, real tools as the oracle."""
