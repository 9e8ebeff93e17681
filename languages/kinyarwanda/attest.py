"""Which of the demo's word forms stand in real Kinyarwanda, and how often.

    python -m kinyarwanda.attest FILE[:FIELD] ...

FIELD says where in a file the Kinyarwanda is, so that nothing else is counted: a column of a .tsv
(its name in the first line, or its number from 1 where there is no such line) or a key of a .jsonl.
Without it every line counts, as in a plain text. The elided words of `cy'umwana` are two forms,
cy' and umwana. Prints the forms that no file has, and those that only one place has.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from languages.kinyarwanda.normalise import apostrophe
from languages.kinyarwanda.world import word_forms
from runtime import console as log
from runtime.console import FLAGS, UserError

WORD = re.compile(r"[^\W\d_]+(?:'(?=[^\W\d_]))?")


def words(source: str) -> Iterator[str]:
    """Every word of FILE[:FIELD], in small letters, its apostrophes made one."""
    name, _, field = source.partition(":")
    if not Path(name).is_file():
        raise UserError(f"{name}: no such file; name texts or word lists", FLAGS)
    with open(name, encoding="utf-8", errors="replace") as f:
        column = int(field) - 1 if field.isdigit() else -1
        for i, line in enumerate(f):
            if field and name.endswith(".jsonl"):
                found = json.loads(line).get(field)
                line = " ".join(found) if isinstance(found, list) else str(found)
            elif field:
                cells = line.rstrip("\n").split("\t")
                if i == 0 and column < 0:
                    if field not in cells:
                        raise UserError(f"{name}: no column {field}; it has {cells}", FLAGS)
                    column = cells.index(field)
                    continue
                line = cells[column] if column < len(cells) else ""
            yield from WORD.findall(apostrophe(line.lower())[0])


def counts(sources: Iterable[str]) -> Counter[str]:
    """How often each of the demo's forms stands in the files."""
    found = Counter(dict.fromkeys(word_forms(), 0))
    for source in sources:
        found.update(w for w in words(source) if w in found)
    return found


def main() -> None:
    if not sys.argv[1:]:
        raise UserError("python -m kinyarwanda.attest FILE[:FIELD] ...: name texts to read", FLAGS)
    found = counts(sys.argv[1:])
    for n, title in ((0, "in no file"), (1, "once")):
        forms = sorted(w for w, count in found.items() if count == n)
        print(f"{title}: {len(forms)}   {' '.join(forms)}")
    print(f"{len(found)} forms, {sum(1 for n in found.values() if n)} attested, median count "
          f"{sorted(found.values())[len(found) // 2]}")


if __name__ == "__main__":
    log.run(main)
