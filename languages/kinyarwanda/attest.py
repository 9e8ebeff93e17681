"""Count how often the word forms of the demo occur in real Kinyarwanda text.

    python -m languages.kinyarwanda.attest FILE[:FIELD] ...

FIELD names the Kinyarwanda part of a file: a column of a .tsv (its name in the first line, or its
number from 1 if there is no header) or a key of a .jsonl. Without FIELD every line is read. The
elided words of `cy'umwana` are two forms, cy' and umwana. It prints the forms that occur in no file
and those that occur once.
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
from runtime import console
from runtime.console import FLAGS, UserError

WORD = re.compile(r"[^\W\d_]+(?:'(?=[^\W\d_]))?")


def words(source: str) -> Iterator[str]:
    """Every word of FILE[:FIELD] in lower case, with one kind of apostrophe."""
    name, _, field = source.partition(":")
    if not Path(name).is_file():
        raise UserError(f"{name}: no such file; expected a text or a word list; check the name",
                        FLAGS)
    with open(name, encoding="utf-8", errors="replace") as f:
        column = int(field) - 1 if field.isdigit() else -1
        for i, line in enumerate(f):
            if field and name.endswith(".jsonl"):
                value = json.loads(line).get(field)
                line = " ".join(value) if isinstance(value, list) else str(value)
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
    """How often each form of the demo occurs in the files."""
    forms = Counter(dict.fromkeys(word_forms(), 0))
    for source in sources:
        forms.update(w for w in words(source) if w in forms)
    return forms


def main() -> None:
    if not sys.argv[1:]:
        raise UserError("python -m languages.kinyarwanda.attest FILE[:FIELD] ...: expected one "
                        "file or more; name the texts to read", FLAGS)
    count_of = counts(sys.argv[1:])
    for n, title in ((0, "in no file"), (1, "once")):
        forms = sorted(form for form, count in count_of.items() if count == n)
        print(f"{title}: {len(forms)}   {' '.join(forms)}")
    print(f"{len(count_of)} forms, {sum(1 for n in count_of.values() if n)} attested, median count "
          f"{sorted(count_of.values())[len(count_of) // 2]}")


if __name__ == "__main__":
    console.run(main)
