#!/usr/bin/env python3
"""Plant bytes where no state shows them and nothing needs them, and count those a deep audit does not point at.

    tools/plant_bytes.py --plants 10000 --seed 1

Images of every kind are made with qemu-img, qemu-io and qemu-system; which plants count is QEMU's word
(tests/plants.py). Prints a line for each miss, with the seed that makes the image again, and figures by kind of place.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests import plants
from tests.qemu import QemuError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plants", type=int, default=200, help="how many plants that count are wanted")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kinds", nargs="*", default=list(plants.KINDS), choices=list(plants.KINDS))
    parser.add_argument("--remainders", type=int, default=60, help="plants into remainders, for each image")
    parser.add_argument("--structures", type=int, default=6, help="plants into what seems to be in use, for each image")
    args = parser.parse_args()
    counted, lost = Counter[str](), Counter[str]()
    by_kind = Counter[str]()
    visible = images = 0
    started = time.monotonic()
    while counted.total() < args.plants:
        kind, seed = args.kinds[images % len(args.kinds)], f"{args.seed}-{images}"
        images += 1
        with tempfile.TemporaryDirectory(prefix="plants-") as folder:
            chance = random.Random(f"{kind}-{seed}")
            try:
                made = plants.KINDS[kind](chance, Path(folder))
                outcome = plants.try_plants(made, chance, args.remainders, args.structures)
            except QemuError as error:  # LUKS takes for ever on a busy machine
                print(f"not made: {kind} {seed}: {error}"[:200], file=sys.stderr, flush=True)
                continue
        counted.update(plant.place for plant in outcome.counted)
        lost.update(plant.place for plant in outcome.missed)
        by_kind[kind] += len(outcome.counted)
        visible += outcome.visible
        for plant in outcome.missed:
            words = f"{plant.file or 'image'} at {plant.offset:#x}, {len(plant.content)} bytes, {plant.place}"
            print(f"missed: {kind} {seed}: {words}", flush=True)
        if images % 20 == 0:
            print(f"{counted.total()} plants, {lost.total()} missed, {images} images", file=sys.stderr, flush=True)
    seconds = time.monotonic() - started
    print(f"{counted.total()} plants in {images} images, {lost.total()} missed, {seconds:.0f} s")
    print(f"{visible} more that QEMU showed or complained about, which do not count")
    for place, count in counted.most_common():
        print(f"  {count:6}  {place}" + (f"  ({lost[place]} missed)" if lost[place] else ""))
    print("by kind of image: " + ", ".join(f"{kind} {count}" for kind, count in by_kind.most_common()))
    return int(bool(lost))


if __name__ == "__main__":
    sys.exit(main())
