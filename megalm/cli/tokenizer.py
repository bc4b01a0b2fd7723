"""Train a tokenizer on a corpus, or take one that is there.

    megalm tokenizer books/ --vocab-size 32768 --out tokenizer.json
    megalm tokenizer dump.xml.bz2 --corpus wikipedia --kind wordpiece --vocab-size 30522 --out bert.json
    megalm tokenizer chats/ --vocab-size 32768 --special-token '<|im_start|>' '<|im_end|>' --out chat.json
    megalm tokenizer --from downloaded/tokenizer.json --out tokenizer.json
    megalm tokenizer --from tokenizer.json --special-token '<|im_start|>' '<|im_end|>' --out chat/tokenizer.json

Exit codes: 0 done, 2 bad arguments, 3 bad data.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from megalm.config.arguments import LineParser, user_path
from megalm.data.document import Document
from megalm.data.prepare.clean import Cleaned, Cleaner, Cleaning
from megalm.data.prepare.corpora import CORPORA, SPLITS_ON, UNDECODABLE, CorpusOptions
from megalm.data.shards.write import write_durably
from megalm.data.tally import FileTally, RejectedFile
from megalm.data.tokenization.roles import Marks, Roles
from megalm.data.tokenization.settings_files import KEPT_FILES
from megalm.data.tokenization.tokenizer import TOKENIZER_FILE, Tokenizer
from megalm.data.tokenization.training import train_byte_level_bpe, train_wordpiece, with_special_tokens
from megalm.errors import DataError, ExitCode
from megalm.launch.guard import guarded
from megalm.ownership import beside, owned

_BLOCK_BYTES = 2**22
_LISTED = 12
"""Special tokens that are printed; some tokenizers have thousands."""


def main(arguments: Sequence[str], prog: str) -> int:
    """Run the command; ``prog`` is what it was called as. Returns its exit code."""
    parser = _parser(prog)
    options = parser.parse_args(arguments)
    if problems := _problems(options):
        parser.error("\n".join(problems))
    return guarded(lambda: _make(options), interrupted="interrupted; nothing was written")


def _make(options: argparse.Namespace) -> int:
    out = _file(options.out)
    with owned(beside(out), f"--out {out}", "wait for it to end, or give another --out", say=_say) as ownership:
        tokenizer, trained_on = _tokenizer(options)
        ownership.claim.check()
        _save(tokenizer, out)
    print(f"{out}: {tokenizer.kind}, {tokenizer.vocab_size:,} tokens{trained_on}")
    if options.vocab_size is not None and tokenizer.vocab_size < options.vocab_size:
        print(f"--vocab-size {options.vocab_size}: the text is enough for {tokenizer.vocab_size:,} tokens only")
    start = " ".join(tokenizer.roles.before)
    begin = f"begin with {start} and " if start else ""
    names = [*tokenizer.special_tokens]
    more = f", … ({len(names):,} in all)" if len(names) > _LISTED else ""
    print(f"special tokens: {', '.join(names[:_LISTED])}{more}; documents {begin}end with {tokenizer.roles.end}")
    return ExitCode.DONE


def _file(out: str) -> Path:
    """The file to write; in a folder it has its usual name."""
    path = Path(out)
    return path / TOKENIZER_FILE if out.endswith(("/", "/.", "/..")) or path.is_dir() else path


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _tokenizer(options: argparse.Namespace) -> tuple[Tokenizer, str]:
    """The tokenizer, and what it was trained on, in words."""
    if options.source is None:
        return _train(options)
    marks = Marks(eos=options.eos)
    tokenizer = Tokenizer.load(options.source, marks=marks)
    if options.special_token:
        tokenizer = with_special_tokens(tokenizer, options.special_token, marks=marks)
    return tokenizer, ""


def _train(options: argparse.Namespace) -> tuple[Tokenizer, str]:
    texts = _Texts(options)
    with Console(stderr=True).status("reading and counting"):
        if options.kind == "bpe":
            tokenizer = train_byte_level_bpe(texts, options.vocab_size, options.special_token)
        else:
            tokenizer = train_wordpiece(texts, options.vocab_size, options.special_token, lowercase=options.lowercase)
    sample = "".join(texts.sample)
    per_token = len(sample.encode()) / max(len(tokenizer.encode(sample)), 1)
    return (
        tokenizer,
        f", trained on {texts.documents:,} documents ({texts.megabytes:.1f} MB), {per_token:.2f} bytes a token"
        f"{texts.not_read()}",
    )


def _save(tokenizer: Tokenizer, out: Path) -> None:
    """Write the file, and beside it what says its tokens' roles, where it does not say them itself."""
    kept = {name: text for name, text in tokenizer.texts().items() if name != TOKENIZER_FILE}
    if _roles_without_files(tokenizer) == tokenizer.roles:
        kept = {}
    out.parent.mkdir(parents=True, exist_ok=True)
    for name in KEPT_FILES:
        there = out.parent / name
        if there.exists() and there.read_text(encoding="utf-8", errors="replace") != kept.get(name):
            raise DataError(f"--out {out}: {there} is another tokenizer's; remove it, or give --out in another folder")
    for name, text in {**kept, out.name: tokenizer.definition}.items():
        write_durably(out.parent / name, text.encode())


def _roles_without_files(tokenizer: Tokenizer) -> Roles | None:
    try:
        return Tokenizer(tokenizer.definition).roles
    except DataError:
        return None


class _Texts:
    """The texts of a corpus, and a count of them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self.documents = 0
        self.megabytes = 0.0
        self.sample: list[str] = []
        self.left_out = FileTally()
        self.removed: Counter[str] = Counter()

    def not_read(self) -> str:
        """Lines on what was left out; empty where nothing was."""
        lines = [f"\nfiles left out: {self.left_out.line()}"] if self.left_out.total() else []
        if self.removed:
            rules = ", ".join(f"{count:,} {rule}" for rule, count in self.removed.most_common())
            lines.append(f"\ndocuments left out: {rules}")
        return "".join(lines)

    def __iter__(self) -> Iterator[str]:
        cleaner = Cleaner(Cleaning())
        corpus = CORPORA[self._options.corpus](_corpus_options(self._options))
        self.left_out.update(corpus.files_left_out)
        for block in corpus.blocks(_BLOCK_BYTES):
            for document in block.documents():
                if isinstance(document, RejectedFile):
                    self.left_out.add(document)
                    continue
                cleaned = cleaner.clean(document) if isinstance(document, Document) else document
                if not isinstance(cleaned, Cleaned):
                    self.removed[cleaned.rule] += 1
                    continue
                text = cleaned.document.text
                self.documents += 1
                self.megabytes += len(text.encode("utf-8", "replace")) / 1e6
                if len(self.sample) < 100:
                    self.sample.append(text[:10_000])
                yield text


def _corpus_options(options: argparse.Namespace) -> CorpusOptions:
    inputs = tuple(options.input)
    decoding = {"encoding": options.encoding, "undecodable": options.undecodable}
    if options.corpus == "text":
        return CorpusOptions(inputs, split_on=options.split_on, **decoding)
    if options.corpus == "jsonl":
        return CorpusOptions(inputs, text_field=options.text_field, **decoding)
    if options.corpus == "hf":
        return CorpusOptions(inputs, text_field=options.text_field)
    return CorpusOptions(inputs, **decoding)


def _problems(options: argparse.Namespace) -> list[str]:
    if options.source is not None:
        given = [name for name in ("vocab_size", "lowercase") if getattr(options, name)]
        problems = [
            f"--{name.replace('_', '-')} is for training; --from takes a tokenizer that is there" for name in given
        ]
        return [*problems, *(["INPUT and --from: give one of them"] if options.input else [])]
    problems = []
    if not options.input and options.corpus != "stdlib":
        problems.append("INPUT is needed: files or folders to learn from (or --from tokenizer.json)")
    if options.vocab_size is None:
        problems.append("--vocab-size is needed: how many tokens to learn, special ones included")
    if options.lowercase and options.kind != "wordpiece":
        problems.append("--lowercase: only --kind wordpiece folds case; a byte-level BPE loses nothing")
    return problems


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = LineParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("input", nargs="*", type=user_path, metavar="INPUT", help="files or folders")
    add("--corpus", choices=sorted(CORPORA), default="text", help="kind of corpus (default: text)")
    add("--split-on", choices=SPLITS_ON, default="file", help="text: what ends a document")
    add("--text-field", default="text", metavar="NAME", help="jsonl, hf: where a record's text is")
    add("--encoding", metavar="NAME", help="of text files without a byte-order mark (default: utf-8)")
    add(
        "--undecodable",
        choices=UNDECODABLE,
        default="refuse",
        help="records in another encoding: refuse (stop, the default) or reject (leave out, and count)",
    )
    add("--kind", choices=("bpe", "wordpiece"), default="bpe", help="byte-level BPE (GPT-2) or WordPiece (BERT)")
    add("--vocab-size", type=int, metavar="N", help="tokens, special ones included")
    add("--special-token", nargs="+", default=[], metavar="TOKEN", help="besides the usual ones; with --from: to add")
    add("--lowercase", action="store_true", help="wordpiece: fold case and strip accents")
    add(
        "--from",
        dest="source",
        type=user_path,
        metavar="PATH",
        help="tokenizer.json, or a folder of one, to take",
    )
    add("--eos", metavar="TOKEN", help="with --from: its token that ends a document, where that has no usual name")
    add("--out", required=True, type=user_path, metavar="FILE", help="tokenizer.json to write")
    return parser
