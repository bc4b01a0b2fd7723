"""What a corpus is told."""

from __future__ import annotations

from dataclasses import dataclass, fields

from megalm.data.names import shown
from megalm.data.prepare.corpora.contents import is_text_encoding
from megalm.errors import DataError

UNDECODABLE = ("refuse", "reject")
NO_FIELD = "no field "
"""How the reason begins why a record that lacks a field is left out."""


@dataclass(frozen=True)
class Reading:
    """How files of records are decoded.

    Attributes:
        encoding: of files without a byte-order mark; None: UTF-8.
        reject: whether a record that is in another encoding is counted and left out, instead of ending the preparation.
    """

    encoding: str | None = None
    reject: bool = False


@dataclass(frozen=True)
class CorpusOptions:
    """Where a corpus is and how it is laid out; each corpus takes some of these, and refuses the others.

    Attributes:
        inputs: files and folders, or for ``hf`` the name of a dataset.
        split_on: what ends a document in a text file: ``file`` (its end), ``blank-line`` or ``line``.
        text_field: field of a record that holds the text; dots lead into nested records.
        prompt: field of a record, or text with ``{fields}``, that is shown and not learnt.
        completion: the same, for what is learnt.
        encoding: of files without a byte-order mark; None: UTF-8.
        undecodable: what a record does that is not in its file's encoding: ``refuse`` stops, ``reject`` counts it.
        hf_config: configuration of a ``datasets`` dataset.
        hf_split: split of a ``datasets`` dataset.
    """

    inputs: tuple[str, ...] = ()
    split_on: str = "file"
    text_field: str = "text"
    prompt: str = "prompt"
    completion: str = "completion"
    encoding: str | None = None
    undecodable: str = "refuse"
    hf_config: str | None = None
    hf_split: str = "train"

    @property
    def source(self) -> str:
        """The inputs, in words."""
        return ", ".join(map(shown, self.inputs))

    @property
    def reading(self) -> Reading:
        """How files of records are decoded."""
        return Reading(self.encoding, self.undecodable == "reject")

    def check(self, corpus: str, *taken: str) -> None:
        """Raise DataError if an option is set that a corpus does not take, or none of its inputs is given."""
        if "inputs" in taken and not self.inputs:
            raise DataError(f"--corpus {corpus} needs --input")
        if "encoding" in taken and self.encoding is not None and not is_text_encoding(self.encoding):
            raise DataError(
                f"--encoding {self.encoding}: there is no such encoding; latin-1, cp1252, utf-16 and gb18030 are some"
            )
        if self.undecodable not in UNDECODABLE:
            raise DataError(f"--undecodable {self.undecodable}: {' or '.join(UNDECODABLE)}")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in taken and value != field.default:
                shown = value[0] if field.name == "inputs" else value
                hint = "; --corpus text reads files" if corpus == "stdlib" else ""
                raise DataError(f"{option_name(field.name)} {shown}: the {corpus} corpus takes no such option{hint}")


def how_to_name_fields(corpus: str) -> str:
    """What to do where records have other fields than those that were looked for."""
    if corpus == "sft":
        return "--prompt and --completion name the fields, or hold their names in braces; messages holds a conversation"
    return "--text-field names the field that holds the text"


def option_name(field: str) -> str:
    """A field as the command line spells it."""
    return "--input" if field == "inputs" else f"--{field.replace('_', '-')}"
