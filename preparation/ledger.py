"""The ledger of a bin: every document and byte that was read, by outcome.

Outcomes: kept, empty, too short, duplicate, contaminated, undecodable, too long, cut, masked,
equal, identical, length ratio. The count "read" is always the sum of all others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from runtime.console import UserError

MAX_UNDECODABLE_SHARE = 0.001  # of the documents


@dataclass
class Ledger:
    """Counts of documents and bytes by outcome, of the places that each normalising step changed,
    and of the characters that the tokenizer cannot spell."""

    documents: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    changes: Counter[str] = field(default_factory=Counter)
    n_unspelled: int = 0

    def add(self, outcomes: Sequence[str], sizes: Sequence[int]) -> None:
        """Add D documents: the outcome and the bytes read of each."""
        self.documents["read"] += len(outcomes)
        self.documents.update(outcomes)
        self.bytes["read"] += sum(sizes)
        for outcome, n_bytes in zip(outcomes, sizes, strict=True):
            self.bytes[outcome] += n_bytes

    def check_undecodable(self, specs: Sequence[str], advice: str) -> None:
        """UserError if more than MAX_UNDECODABLE_SHARE of the documents are undecodable."""
        n_undecodable, n_read = self.documents["undecodable"], self.documents["read"]
        if n_undecodable > MAX_UNDECODABLE_SHARE * n_read:
            raise UserError(f"{', '.join(specs)}: {n_undecodable} of {n_read} documents are not "
                            f"UTF-8, more than {MAX_UNDECODABLE_SHARE:.1%}; {advice}")

    def to_json(self) -> dict[str, Any]:
        """The ledger as it is written into meta.json."""
        content = {"documents": dict(self.documents), "bytes": dict(self.bytes),
                   "changes": dict(self.changes)}
        if self.n_unspelled:
            content["unspelled"] = self.n_unspelled
        return content


def format_ledger(ledger: Mapping[str, Any], unit: str = "documents") -> str:
    """The table of a ledger as it stands in meta.json; `unit` names what was counted."""
    lines = [f"{'':14}{unit:>12}{'bytes':>16}"]
    for outcome, count in ledger["documents"].items():
        lines.append(f"{outcome:14}{count:>12,}{ledger['bytes'][outcome]:>16,}")
    for step, count in ledger["changes"].items():
        lines.append(f"normalised: {step}, {count:,} places")
    if ledger.get("unspelled"):
        lines.append(f"not spelled: {ledger['unspelled']:,} characters for which the tokenizer has "
                     "no token")
    return "\n".join(lines)
