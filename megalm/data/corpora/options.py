"""What a corpus is told."""

from __future__ import annotations

from dataclasses import dataclass, fields

from megalm.errors import DataError


@dataclass(frozen=True)
class CorpusOptions:
    """Where a corpus is and how it is laid out; each corpus takes some of these, and refuses the others.

    Attributes:
        inputs: files and folders, or for ``hf`` the name of a dataset.
        split_on: what ends a document in a text file: ``file`` (its end), ``blank-line`` or ``line``.
        text_field: field of a record that holds the text; dots lead into nested records.
        prompt: field of a record, or text with ``{fields}``, that is shown and not learnt.
        completion: the same, for what is learnt.
        hf_config: configuration of a ``datasets`` dataset.
        hf_split: split of a ``datasets`` dataset.
    """

    inputs: tuple[str, ...] = ()
    split_on: str = "file"
    text_field: str = "text"
    prompt: str = "prompt"
    completion: str = "completion"
    hf_config: str | None = None
    hf_split: str = "train"

    def check(self, corpus: str, *taken: str) -> None:
        """Raise DataError if an option is set that a corpus does not take, or none of its inputs is given."""
        if "inputs" in taken and not self.inputs:
            raise DataError(f"--corpus {corpus} needs --input")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in taken and value != field.default:
                shown = value[0] if field.name == "inputs" else value
                hint = "; --corpus text reads files" if corpus == "stdlib" else ""
                raise DataError(f"{option_name(field.name)} {shown}: the {corpus} corpus takes no such option{hint}")


def option_name(field: str) -> str:
    """A field as the command line spells it."""
    return "--input" if field == "inputs" else f"--{field.replace('_', '-')}"
