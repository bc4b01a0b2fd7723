#!/usr/bin/env python3
"""Train a byte-level BPE tokenizer on text files or folders of them.

    tools/train_tokenizer.py books/ --vocab-size 32768 --out tokenizer.json

Exit codes: 0 done, 2 bad arguments, 3 bad data.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megalm.data.corpora import CORPORA
from megalm.data.prepare import Counts, documents_of
from megalm.data.tokenizer import train_byte_level_bpe
from megalm.errors import ExitCode, MegalmError


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("input", nargs="+", metavar="INPUT", help="text files or folders, one document per file")
    parser.add_argument("--vocab-size", type=int, required=True, metavar="N", help="tokens, special ones included")
    parser.add_argument("--out", required=True, metavar="FILE", help="tokenizer.json to write")
    options = parser.parse_args(arguments)
    counts = Counts()
    try:
        tokenizer = train_byte_level_bpe(documents_of(CORPORA["text"](options.input), counts), options.vocab_size)
    except MegalmError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(tokenizer.definition, encoding="utf-8")
    print(
        f"{out}: {tokenizer.vocab_size:,} tokens, "
        f"trained on {counts.documents:,} documents ({counts.bytes / 1e6:.1f} MB)"
    )
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main())
