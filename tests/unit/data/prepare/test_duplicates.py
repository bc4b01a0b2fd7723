"""Duplicates: the first of each stays."""

from __future__ import annotations

from pathlib import Path

from megalm.data.prepare.duplicates import Duplicates


def test_exact_and_near_ones_by_order(tmp_path: Path) -> None:
    path = tmp_path / "d.sqlite"
    path.write_text("left by a killed preparation")
    with Duplicates(path) as duplicates:
        assert duplicates.rule(b"a" * 16, []) is None
        assert duplicates.rule(b"a" * 16, []) == "exact duplicate"
        assert duplicates.rule(b"", [1, 2, 3]) is None
        assert duplicates.rule(b"", [9, 2, 9]) == "near duplicate"
        assert duplicates.rule(b"", [2, 1, 9]) is None, "a band is like the same band of another alone"
        assert duplicates.rule(b"", [9, 9, 8]) is None, "what was removed is no measure for others"
        assert duplicates.rule(b"", [2**64 - 1, 2**63, 0]) is None
        assert duplicates.rule(b"", [5, 2**63, 5]) == "near duplicate"
        assert duplicates.rule(b"b" * 16, []) is None
    assert not path.exists()
