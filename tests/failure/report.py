"""What the tests of faults found: each prints its count of faults and violations, and a violation fails the test."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

PROPERTY = "faults"
"""Name of the user property in which a report travels from a worker to the session."""
FILE = Path(__file__).resolve().parents[2] / "failure-report.json"
_MOST_SHOWN = 20


@dataclass
class Report:
    """The count of one test. `figures` are further numbers worth keeping, by what they are called in the line."""

    name: str
    faults: int = 0
    violations: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def violation(self, text: str) -> None:
        """Something that must hold did not; the test goes on and fails at its end."""
        self.violations.append(text)

    def check(self, holds: object, text: str) -> None:
        """A violation unless it holds."""
        if not holds:
            self.violation(text)

    @property
    def line(self) -> str:
        """`F4: 200 faults, 0 violations, 4,012 operations`."""
        parts = [f"{self.faults:,} faults", f"{len(self.violations):,} violations"]
        parts += [f"{value:,} {what}" if isinstance(value, int) else f"{what} {value}" for what, value in self._items()]
        return f"{self.name}: {', '.join(parts)}"

    def _items(self) -> list[tuple[str, Any]]:
        return list(self.figures.items())

    def raise_violations(self) -> None:
        """Fail with the violations, if there are any."""
        if self.violations:
            shown = "\n".join(self.violations[:_MOST_SHOWN])
            pytest.fail(f"{self.line}\n{shown}", pytrace=False)


def reported(reporter: Any) -> list[dict[str, Any]]:
    """The reports of all tests of a session, as plain values; `reporter` is pytest's terminal reporter."""
    reports = [report for each in reporter.stats.values() for report in each if getattr(report, "when", "") == "call"]
    found = [value for report in reports for key, value in report.user_properties if key == PROPERTY]
    return sorted(found, key=lambda value: str(value["name"]))


def print_summary(reporter: Any, keep: bool) -> None:
    """A line for each report, and with `keep` its figures in `failure-report.json` beside those of earlier sessions."""
    found = reported(reporter)
    if found:
        reporter.section("faults")
    for value in found:
        report = Report(**value)
        reporter.write_line(report.line, red=bool(report.violations))
    if keep and found:
        kept = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
        now = datetime.now(UTC).strftime("%Y-%m-%d")
        kept |= {value["name"]: {**value, "date": now, "line": Report(**value).line} for value in found}
        FILE.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def as_property(report: Report) -> tuple[str, dict[str, Any]]:
    """A report as a user property of its test."""
    return PROPERTY, asdict(report)
