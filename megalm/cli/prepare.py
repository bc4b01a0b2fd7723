r"""Prepare a corpus for training: documents ▶ tokens ▶ shards, split into training and validation.

    megalm prepare --corpus stdlib --tokenizer-vocab 4096 --out data/quickstart
    megalm prepare --corpus text --input books/ --split-on blank-line --tokenizer tokenizer.json --out data/books
    megalm prepare --corpus wikipedia --input enwiki-pages-articles.xml.bz2 --tokenizer-vocab 32768 \
        --dedup exact --quality gopher --scrub-pii --out data/wikipedia
    megalm prepare --corpus sft --input dialogues.jsonl --prompt '{dialogue}\n\nSummary:\n' \
        --completion summary --tokenizer data/books/tokenizer.json --pack 2048 --out data/summaries
    mpirun -n 64 megalm prepare --executor mpi ...       srun --mpi=pmix megalm prepare --executor mpi ...
    megalm prepare --verify data/books

A preparation that was cut off goes on where it ended when the same command is given again.
Exit codes: 0 done, 2 bad arguments, 3 bad data, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megalm.config.arguments import LineParser, user_path
from megalm.data.names import shown
from megalm.data.prepare.clean import QUALITY, Cleaning
from megalm.data.prepare.corpora import CORPORA, SPLITS_ON, UNDECODABLE, CorpusOptions
from megalm.data.prepare.executors import Workers, local_workers, mpi_workers
from megalm.data.prepare.progress import PrepareProgress, summary_lines
from megalm.data.prepare.recipe import Recipe
from megalm.data.prepare.run import prepare
from megalm.data.shards.corruption import find_corruption
from megalm.data.shards.dataset import check_folder, inspect_dataset, splits_of
from megalm.data.shards.store import open_store
from megalm.data.tokenization.training import SMALLEST_VOCABULARY
from megalm.errors import DataError, ExitCode
from megalm.launch.guard import guarded

_DUPLICATES = ("exact", "near")
_KINDS = ("bpe", "wordpiece")
_NORMAL_FORMS = ("NFC", "NFKC")


def main(arguments: Sequence[str], prog: str) -> int:
    """Run the command; ``prog`` is what it was called as. Returns its exit code."""
    parser = _parser(prog)
    options = parser.parse_args(arguments)
    if not options.verify and (problems := _problems(options)):
        parser.error("\n".join(problems))
    command = shown(f"{prog} {shlex.join(arguments)}")

    def run() -> int:
        if options.verify:
            return _verify(options.verify)
        if options.executor == "local":
            with local_workers(options.workers) as workers:
                return _prepare(options, workers, command)
        with mpi_workers() as ranks:
            return ExitCode.DONE if ranks is None else _prepare(options, ranks, command)

    return guarded(run, interrupted="interrupted; the same command goes on where this one ended")


def _prepare(options: argparse.Namespace, workers: Workers, command: str) -> int:
    out, started = Path(options.out), time.perf_counter()
    with PrepareProgress() as progress:
        summary = prepare(
            _recipe(options),
            out,
            workers=workers,
            overwrite=options.overwrite,
            progress=progress.update,
            command=command,
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )
    info = inspect_dataset(out)
    if summary is None:
        sizes = f"{info.train_tokens:,} training and {info.val_tokens:,} validation tokens"
        print(f"{shown(out)}: up to date ({sizes}, vocabulary {info.vocab_size:,})")
    else:
        print(*summary_lines(shown(out), summary, time.perf_counter() - started), sep="\n")
    return ExitCode.DONE


def _recipe(options: argparse.Namespace) -> Recipe:
    return Recipe(
        corpus=options.corpus,
        options=CorpusOptions(
            inputs=tuple(options.input),
            split_on=options.split_on,
            text_field=options.text_field,
            prompt=_unescaped(options.prompt),
            completion=_unescaped(options.completion),
            encoding=options.encoding,
            undecodable=options.undecodable,
            hf_config=options.hf_config,
            hf_split=options.hf_split,
        ),
        cleaning=Cleaning(
            normalise=options.normalise,
            quality=tuple(options.quality),
            scrub_secrets=options.scrub_secrets,
            scrub_pii=options.scrub_pii,
            decontaminate=tuple(options.decontaminate),
            ngram=options.ngram,
            encoding=options.encoding,
            max_document_bytes=options.max_document_bytes,
            near_duplicates="near" in options.dedup,
        ),
        exact_duplicates=bool(options.dedup),  # an exact duplicate is a near one too, and found for less
        tokenizer=options.tokenizer,
        eos=options.eos,
        add_bos=options.add_bos,
        tokenizer_vocab=options.tokenizer_vocab,
        tokenizer_kind=options.tokenizer_kind,
        val_fraction=_val_fraction(options),
        val_inputs=tuple(options.val_input),
        chunk_tokens=options.chunk_tokens,
        pack=options.pack,
        license=options.license,
    )


def _verify(location: str) -> int:
    store = open_store(location)
    if store.is_local and not Path(location).is_dir():
        raise DataError(f"--verify {location}: no such folder; the --out of a preparation is what it reads")
    check_folder(store)
    splits = splits_of(store)
    faults = [fault for split in splits for fault in find_corruption(store.below(split))]
    if not faults:
        inspect_dataset(store)  # the tokenizer, and that all belongs together
        print(f"{location}: every chunk of {' and '.join(splits)} is as it was written")
        return ExitCode.DONE
    print(*faults, sep="\n", file=sys.stderr)
    print(f"{location}: {len(faults)} fault{'s' if len(faults) > 1 else ''}", file=sys.stderr)
    return ExitCode.BAD_DATA


def _problems(options: argparse.Namespace) -> list[str]:
    problems = []
    if options.corpus is None or options.out is None:
        problems.append("--corpus and --out are needed (or --verify DIR)")
    if (options.tokenizer is None) == (options.tokenizer_vocab is None):
        problems.append("give either --tokenizer with a tokenizer.json, or --tokenizer-vocab to train one")
    if options.add_bos and options.tokenizer is None:
        problems.append("--add-bos: a tokenizer that is trained here has no bos; give --tokenizer with one that has")
    if options.tokenizer_vocab is not None and options.tokenizer_vocab < SMALLEST_VOCABULARY:
        problems.append(f"--tokenizer-vocab {options.tokenizer_vocab}: must be at least {SMALLEST_VOCABULARY}")
    problems += _validation_problems(options)
    for name in ("chunk_tokens", "workers", "ngram"):
        value = getattr(options, name)
        if value < 1:
            problems.append(f"--{name.replace('_', '-')} {value}: must be at least 1")
    if options.max_document_bytes is not None and options.max_document_bytes < 1:
        problems.append(f"--max-document-bytes {options.max_document_bytes}: must be at least 1")
    if options.pack < 0 or options.pack == 1:
        problems.append(f"--pack {options.pack}: must be a sequence length of at least 2, or 0")
    elif options.pack and options.chunk_tokens >= 1 and options.chunk_tokens % options.pack:
        problems.append(f"--pack {options.pack}: must divide --chunk-tokens {options.chunk_tokens}")
    return problems


def _validation_problems(options: argparse.Namespace) -> list[str]:
    share = _val_fraction(options)
    if not 0.0 <= share < 1.0:
        return [f"--val-fraction {share}: must be 0 (no validation), or lie between 0 and 1"]
    if share and options.val_input:
        return [f"--val-fraction {share} and --val-input: give one of them"]
    if options.val_input and options.corpus == "stdlib":
        return ["--val-input: the stdlib corpus has no inputs; --corpus text reads files"]
    return []


def _val_fraction(options: argparse.Namespace) -> float:
    if options.val_fraction is not None:
        return float(options.val_fraction)
    return 0.0 if options.val_input else Recipe.val_fraction


def _unescaped(text: str) -> str:
    r"""A template in which ``\n`` and ``\t`` may be written as in most languages."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = LineParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--corpus", choices=sorted(CORPORA), help="kind of corpus")
    add(
        "--input",
        nargs="+",
        default=[],
        type=user_path,
        metavar="PATH",
        help="files or folders; hf: parquet files or a dataset's name",
    )
    add("--out", type=user_path, metavar="DIR", help="dataset to write")
    add("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes; the output stays the same")
    add(
        "--executor",
        choices=("local", "mpi"),
        default="local",
        help="processes of this machine, or ranks of an MPI job",
    )
    add("--license", metavar="TEXT", help="of the texts (cc-by-sa-4.0), for the data card and the cards of models")
    add("--overwrite", action="store_true", help="replace DIR if it was prepared differently")
    add("--verify", type=user_path, metavar="DIR", help="read all of a dataset and name each corrupt chunk")

    _add_corpus_options(parser)
    _add_cleaning_options(parser)
    _add_token_options(parser)
    return parser


def _add_corpus_options(parser: argparse.ArgumentParser) -> None:
    corpus = parser.add_argument_group("what a document is")
    defaults = CorpusOptions()
    add = corpus.add_argument
    add("--split-on", choices=SPLITS_ON, default=defaults.split_on, help="text: what ends a document (default: file)")
    add("--text-field", default=defaults.text_field, metavar="NAME", help="jsonl, hf: where a record's text is")
    add("--prompt", default=defaults.prompt, metavar="TEXT", help="sft: a field, or a template with {fields}")
    add("--completion", default=defaults.completion, metavar="TEXT", help="sft: the same; this is what is learnt")
    add("--encoding", metavar="NAME", help="of text files without a byte-order mark (default: utf-8)")
    add(
        "--undecodable",
        choices=UNDECODABLE,
        default=defaults.undecodable,
        help="records in another encoding: refuse (stop, the default) or reject (leave out, and count)",
    )
    add("--hf-config", metavar="NAME", help="hf: configuration of a named dataset")
    add("--hf-split", default=defaults.hf_split, metavar="NAME", help="hf: its split (default: train)")


def _add_cleaning_options(parser: argparse.ArgumentParser) -> None:
    cleaning = parser.add_argument_group("cleaning (all of it is counted in data_card.md)")
    add = cleaning.add_argument
    add("--normalise", choices=_NORMAL_FORMS, help="Unicode normal form")
    add("--dedup", nargs="+", choices=_DUPLICATES, default=[], help="remove exact, or also near duplicates (MinHash)")
    add("--quality", nargs="+", choices=QUALITY, default=[], help="rules that documents must pass")
    add("--scrub-secrets", action="store_true", help="replace private keys and access tokens of services")
    add("--scrub-pii", action="store_true", help="replace e-mail, phone, IP, card and id numbers by placeholders")
    add(
        "--decontaminate",
        nargs="+",
        default=[],
        type=user_path,
        metavar="FILE",
        help="remove documents that overlap with these",
    )
    add("--ngram", type=int, default=Cleaning.ngram, metavar="N", help="words that make an overlap (default: 13)")
    add("--max-document-bytes", type=int, metavar="N", help="remove longer documents")


def _add_token_options(parser: argparse.ArgumentParser) -> None:
    tokens = parser.add_argument_group("tokens")
    add = tokens.add_argument
    add(
        "--tokenizer",
        type=user_path,
        metavar="PATH",
        help="tokenizer.json to use, or a folder that has one: a run, a dataset, a model",
    )
    add("--eos", metavar="TOKEN", help="its token that ends a document, where its own files name none, or another")
    add(
        "--add-bos",
        action=argparse.BooleanOptionalAction,
        help="begin each document with its bos, or do not (default: as its own files say)",
    )
    add("--tokenizer-vocab", type=int, metavar="N", help="train a tokenizer of N tokens instead")
    add("--tokenizer-kind", choices=_KINDS, default="bpe", help="which kind to train (default: byte-level bpe)")
    add("--val-fraction", type=float, help="share of validation documents (default: 0.02); 0: none")
    add("--val-input", nargs="+", default=[], type=user_path, metavar="PATH", help="a validation corpus instead")
    add("--chunk-tokens", type=int, default=Recipe.chunk_tokens, help="tokens per chunk; sequence lengths divide it")
    add("--pack", type=int, default=0, metavar="LENGTH", help="fit whole documents into sequences of this length")
