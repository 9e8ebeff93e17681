"""Which of the demo's word forms stand in real texts and word lists, and how often.

    python -m kinyarwanda.attest FILE ...

Reads .txt, .jsonl (every string in it) and .tsv (every cell); apostrophes are made one and part
words, so that `cy'umwana` counts for cy and umwana. Prints the forms that no file has, and those
that only one place has.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import log
from kinyarwanda.world import word_forms
from log import FLAGS, UserError

WORD = re.compile(r"[a-z]+")


def words(path: Path) -> Iterable[str]:
    """Every word of a file, in small letters."""
    with open(path, encoding="utf-8", errors="replace") as f:
        for line in f:
            if path.suffix == ".jsonl":
                line = " ".join(x for x in json.loads(line).values() if isinstance(x, str))
            yield from WORD.findall(line.lower())


def counts(paths: Iterable[Path]) -> Counter[str]:
    """How often each of the demo's forms stands in the files."""
    forms = word_forms()
    found: Counter[str] = Counter(dict.fromkeys(forms, 0))
    for path in paths:
        found.update(w for w in words(path) if w in forms)
    return found


def main() -> None:
    paths = [Path(x) for x in sys.argv[1:]]
    if not paths or not all(p.is_file() for p in paths):
        raise UserError(
            "python -m kinyarwanda.attest FILE ...: name word lists or texts that exist", FLAGS
        )
    found = counts(paths)
    for n, title in ((0, "in no file"), (1, "once")):
        forms = sorted(w for w, count in found.items() if count == n)
        print(f"{title}: {len(forms)}   {' '.join(forms)}")
    print(f"{len(found)} forms, {sum(1 for n in found.values() if n)} attested, median count "
          f"{sorted(found.values())[len(found) // 2]}")


if __name__ == "__main__":
    log.run(main)
