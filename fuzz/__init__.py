"""Structured fuzzing of the reader, the auditor and the adapters; not part of the package.

``python -m fuzz --help`` from the repository's root says how to run it.
"""
