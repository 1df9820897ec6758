"""Coverage-guided fuzzing of one target with atheris: ``python -m fuzz.guided read FOLDER [libFuzzer options]``.

FOLDER holds the growing corpus; it is filled from :mod:`fuzz.corpus` when empty. For example
``python -m fuzz.guided audit /tmp/guided -max_total_time=3600 -rss_limit_mb=2048 -timeout=20``.
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["qcow2_forensics", "pytsk3_qcow2", "dfvfs_qcow2"]):
    from . import targets

from . import corpus
from .mutator import Mutator

_MAX_BYTES = 1 << 20
_STRUCTURED = 0.7  # the share of mutations that know the format


def main() -> None:
    """Fill the corpus and hand over to libFuzzer."""
    name, folder = sys.argv[1], Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.iterdir()):
        with tempfile.TemporaryDirectory() as temporary:
            for path in corpus.make(Path(temporary)):
                data = path.read_bytes()
                if len(data) <= _MAX_BYTES:
                    (folder / path.name).write_bytes(data)

    def one_input(data: bytes) -> None:
        targets.run(name, data)

    def custom_mutator(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if data[:4] != b"QFI\xfb" or rng.random() > _STRUCTURED:
            return bytes(atheris.Mutate(data, max_size))
        return Mutator(data).mutate(rng)[0][:max_size]

    atheris.Setup(
        [sys.argv[0], str(folder), f"-max_len={_MAX_BYTES}", *sys.argv[3:]], one_input, custom_mutator=custom_mutator
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
