"""The data card: what a dataset is made of, for people (``data_card.md``), programs (``.json``) and eyes (``.png``)."""

from __future__ import annotations

import json
from pathlib import Path

from megalm.data.place import DATA_CARD_FILE
from megalm.data.prepare.left_out import NAMES, SHARE, LeftOutTotals
from megalm.data.prepare.recipe import Recipe
from megalm.data.prepare.summary import Lengths, Summary
from megalm.data.shards.write import write_durably
from megalm.data.tally import FileTally
from megalm.figure import new_figure

CARD_FILE, CARD_DATA_FILE, LENGTHS_FILE = "data_card.md", DATA_CARD_FILE, "document_lengths.png"
_COLOUR = "#3366a8"
_KINDS_SHOWN, _DOCUMENTS_SHOWN = 40, 20


def write_card(folder: Path, recipe: Recipe, summary: Summary, command: str) -> None:
    """Write all three files into a dataset's folder."""
    contents = {"command": command, **summary.to_dict(), "document_tokens": _quantiles(summary.lengths)}
    write_durably(folder / CARD_DATA_FILE, (json.dumps(contents, indent=1, ensure_ascii=False) + "\n").encode())
    write_durably(folder / CARD_FILE, card_text(recipe, summary, command).encode())
    plot_lengths(summary.lengths, folder / LENGTHS_FILE, title=summary.source)


def card_text(recipe: Recipe, summary: Summary, command: str) -> str:
    """The card as Markdown."""
    lines = [
        "# Data card",
        "",
        f"Made by `megalm` from the corpus `{recipe.corpus}`: {summary.source}.",
        "",
        "```",
        command,
        "```",
        "",
        *([] if recipe.license is None else [f"License of the texts: {_cell(recipe.license)}.", ""]),
        *_amounts(summary),
        "| split | documents | tokens | with loss | shards |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for split, index in summary.splits.items():
        lines.append(
            f"| {split} | {index.documents:,} | {index.tokens:,} | {index.loss_tokens:,} | {index.num_shards:,} |"
        )
    lines += _rows(summary)
    lines += ["", f"Tokenizer: {summary.vocab_size:,} tokens, sha256 `{summary.tokenizer_sha256}`.", ""]
    if (smaller := smaller_tokenizer(summary)) is not None:
        lines += [f"{smaller}.", ""]
    lines += [f"Each document {document_marks(summary)}.", ""]
    lines += _what_changed(summary)
    if summary.validation is not None:
        lines += ["# Validation corpus", "", f"Of its own: {summary.validation.source}.", ""]
        lines += [*_amounts(summary.validation), *_what_changed(summary.validation)]
    quantiles = ", ".join(f"{share} {tokens:,}" for share, tokens in _quantiles(summary.lengths).items())
    lines += ["## Tokens per document", "", f"{quantiles} (to within a fifth).", "", f"![lengths]({LENGTHS_FILE})"]
    return "\n".join(lines) + "\n"


def smaller_tokenizer(summary: Summary) -> str | None:
    """That the text was too little for the tokenizer that was asked for; None where it was not."""
    asked = summary.recipe.tokenizer_vocab
    if asked is None or summary.vocab_size >= asked:
        return None
    return f"--tokenizer-vocab {asked}: the text is enough for a tokenizer of {summary.vocab_size:,} tokens only"


def document_marks(summary: Summary) -> str:
    """How documents begin and end, and who says so."""
    start, recipe = " ".join(summary.document_start), summary.recipe
    says = {None: "as the tokenizer's own files say", True: "--add-bos", False: "--no-add-bos"}[recipe.add_bos]
    begins = f"begins with `{start}` ({says})" if start else "begins with its text"
    if not start and recipe.add_bos is not None:
        begins += f" ({says})"
    return f"{begins} and ends with `{summary.document_end}`"


def _rows(summary: Summary) -> list[str]:
    """Rows with nothing to learn, which a run reads and takes nothing from."""
    if not summary.rows:
        return []
    lines = [
        "",
        "Rows with nothing to learn: no token of theirs carries loss, as where a prompt is longer than a row.",
        "",
        "| split | sequence length | rows | nothing to learn |",
        "| --- | ---: | ---: | ---: |",
    ]
    for split, counts in summary.rows.items():
        lines += [f"| {split} | {n:,} | {counts.rows[n]:,} | {counts.empty[n]:,} |" for n in counts.lengths]
    return lines


def plot_lengths(lengths: Lengths, path: Path, *, title: str) -> None:
    """A histogram of document lengths, on a logarithmic axis, to a PNG of 960 x 480 pixels."""
    figure = new_figure((8, 4), dots_per_inch=120)
    axes = figure.add_subplot()
    counts, edges = lengths.counts, lengths.edges
    used = counts.nonzero()[0]
    first, last = (int(used[0]), int(used[-1]) + 1) if used.size else (0, 1)
    axes.stairs(counts[first:last], edges[first : last + 1], fill=True, color=_COLOUR)
    axes.set_xscale("log", base=2)
    from matplotlib.ticker import FuncFormatter

    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: f"{tokens:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:,.0f}"))
    axes.set_xlabel("tokens per document")
    axes.set_ylabel("documents")
    axes.set_title(title if len(title) <= 70 else title[:69] + "…", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    temporary = path.with_name(f"{path.stem}.tmp{path.suffix}")
    figure.savefig(temporary, metadata={"Software": None})  # the same picture from the same data
    temporary.replace(path)


def _amounts(summary: Summary) -> list[str]:
    """How much was read of a corpus, and how much stayed."""
    return [
        "| | |",
        "| --- | ---: |",
        *_files_read(summary),
        f"| documents read | {summary.read:,} |",
        f"| documents kept | {summary.documents:,} |",
        f"| text read | {summary.bytes:,} bytes |",
        f"| text kept | {summary.text_bytes:,} bytes |",
        f"| tokens, ends of documents included | {summary.tokens:,} |",
        f"| bytes per token | {summary.text_bytes / max(summary.tokens, 1):.2f} |",
        "",
    ]


def _what_changed(summary: Summary) -> list[str]:
    """What was left out of a corpus, and changed in it."""
    return [
        *_files_left_out(summary.files_left_out),
        *_counts("Removed documents", "rule", summary.removed, summary.examples),
        *_counts("Changes inside documents", "change", summary.notes),
        *_left_out(summary.left_out, summary.read),
    ]


def _files_read(summary: Summary) -> list[str]:
    if not summary.files and not summary.files_left_out.total():
        return []
    return [
        f"| files read | {summary.files:,} ({summary.file_bytes:,} bytes) |",
        f"| files left out | {summary.files_left_out.total():,} |",
    ]


def _files_left_out(files: FileTally) -> list[str]:
    """Every file that was not read, by reason."""
    if not files.total():
        return []
    rows = [
        f"| {reason} | {one.files:,} | {one.bytes:,} | {_cell(', '.join(one.examples))} |"
        for reason, one in files.items()
    ]
    return ["## Files left out", "", "| reason | files | bytes | such as |", "| --- | ---: | ---: | --- |", *rows, ""]


def _counts(title: str, what: str, counts: dict[str, int], examples: dict[str, list[str]] | None = None) -> list[str]:
    if not counts:
        return [f"## {title}", "", "None.", ""]
    if not examples:
        rows = [f"| {name} | {count:,} |" for name, count in counts.items()]
        return [f"## {title}", "", f"| {what} | count |", "| --- | ---: |", *rows, ""]
    rows = [f"| {name} | {count:,} | {_cell(', '.join(examples.get(name, ())))} |" for name, count in counts.items()]
    return [f"## {title}", "", f"| {what} | count | such as |", "| --- | ---: | --- |", *rows, ""]


def _left_out(totals: LeftOutTotals, read: int) -> list[str]:
    """What a reader of the corpus did not pass on; nothing where it passes on all."""
    if not totals.kinds:
        return []
    rows = totals.by_words()
    shown, others = rows[:_KINDS_SHOWN], rows[_KINDS_SHOWN:]
    if others:
        times, words = sum(row[1] for row in others), sum(row[2] for row in others)
        shown.append((f"{len(others):,} more, the largest in {CARD_DATA_FILE}", times, words))
    lines = [
        "## Left out of documents",
        "",
        f"Words in elements that are not rendered as text, over all {read:,} documents read; the first {NAMES:,} names "
        "are counted one by one, later ones together.",
        "",
        "| what | times | words |",
        "| --- | ---: | ---: |",
        *(f"| {_cell(name)} | {times:,} | {words:,} |" for name, times, words in shown),
        f"| all | {sum(row[1] for row in rows):,} | {totals.words:,} |",
        "",
        f"Documents that lose more than {SHARE:.0%} of their words, references aside: {totals.over:,}.",
        "",
    ]
    if totals.documents:
        lines += ["| document | words kept | words left out | mostly |", "| --- | ---: | ---: | --- |"]
        lines += [
            f"| {_cell(name)} | {kept:,} | {lost:,} | {_cell(mostly)} |"
            for name, kept, lost, mostly in totals.documents[:_DOCUMENTS_SHOWN]
        ]
        lines.append("")
    return lines


def _cell(text: str) -> str:
    """Text for a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def _quantiles(lengths: Lengths) -> dict[str, int]:
    return {f"{share:.0%}": round(lengths.quantile(share)) for share in (0.05, 0.25, 0.5, 0.75, 0.95)}
