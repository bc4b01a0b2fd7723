#!/usr/bin/env python3
"""``megalm tokenizer``, in a checkout that is not installed under that name."""

from __future__ import annotations

import sys

from megalm.cli.main import main as megalm


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    return megalm(["tokenizer", *(sys.argv[1:] if arguments is None else arguments)], prog="tools/train_tokenizer.py")


if __name__ == "__main__":
    sys.exit(main())
