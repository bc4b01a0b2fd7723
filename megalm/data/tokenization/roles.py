"""What a tokenizer's tokens are for, by its own files: which begins, ends, pads or masks a text. No torch.

``tokenizer.json`` lists tokens and may add some around a text; the files beside it name their roles, as Hugging Face's
libraries lay them out. A role that no file gives falls to a token of a usual name, if no text can spell that token: an
ordinary word never ends a document, whatever it is called.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from operator import itemgetter
from typing import TYPE_CHECKING

from megalm.data.tokenization.library_classes import END_OF_TEXT, class_roles
from megalm.data.tokenization.settings_files import (
    GENERATION_FILE,
    ROLES,
    SETTINGS_FILE,
    SPECIAL_FILE,
    TEMPLATE_FILE,
    SettingsFiles,
    token_content,
)
from megalm.errors import DataError

if TYPE_CHECKING:
    import tokenizers

ENDS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "[SEP]")
"""What published tokenizers call the token that ends a document; the first that a tokenizer has is taken."""
START = "[CLS]"
USUAL_START = (START,)
"""Begins every document, where a tokenizer has it and says nothing else."""
START_KEY = "megalm_document_start"
"""In ``tokenizer_config.json``: what begins a document, where ``add_bos_token`` alone cannot say it."""
MASKS = ("[MASK]", "<mask>")
"""What published tokenizers call the token that stands for a masked one."""
_USUAL: dict[str, tuple[str, ...]] = {
    "eos": ENDS[:-1],
    "bos": ("<s>", "<|begin_of_text|>", "<|startoftext|>", "<bos>"),
    "pad": ("[PAD]", "<pad>", "<|padding|>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": (START,),
    "sep": ("[SEP]",),
    "mask": MASKS,
}
_ALONE_LEAVE_OPEN = {"eos_token", "add_bos_token", START_KEY}
"""Settings of which a ``tokenizer_config.json`` that has no others leaves the other roles to usual names."""
_SPOKEN_TOKENS = 12
"""Special tokens that a message lists; some tokenizers have thousands."""
_MOST_PROBES = 100
"""Words that are tried until one is not dropped by the tokenizer."""


@dataclass(frozen=True)
class Roles:
    """What a tokenizer's tokens are for.

    Attributes:
        bos: content of the token that begins a text; None: there is none. So are the next ones.
        eos: that ends one.
        pad: that fills rows up.
        unk: that stands for what the vocabulary cannot spell.
        cls: that an encoder's text begins with.
        sep: that ends each text of an encoder's.
        mask: that stands for a masked token.
        before: contents of the tokens that go before a text.
        after: contents of the tokens that go after one.
        end: the token that ends a document: ``eos``, or what takes its place where no file names one.
        chat_template: how turns become text, in Jinja's language; None: the files have none.
    """

    bos: str | None
    eos: str | None
    pad: str | None
    unk: str | None
    cls: str | None
    sep: str | None
    mask: str | None
    before: tuple[str, ...]
    after: tuple[str, ...]
    end: str
    chat_template: str | None = None

    @property
    def add_bos(self) -> bool:
        """Whether a text begins with ``bos``."""
        return self.bos is not None and self.bos in self.before

    def token(self, role: str) -> str | None:
        """The token of one of ``ROLES``."""
        value: str | None = getattr(self, role)
        return value


@dataclass(frozen=True)
class Marks:
    """What is decided of a document's marks otherwise than the tokenizer's own files do; None: as they say.

    Attributes:
        eos: content of the token that ends a document.
        eos_id: the same by its id.
        add_bos: whether a document begins with the token that begins a text.
        before: contents of what goes before a document; those that are no tokens are left out.
    """

    eos: str | None = None
    eos_id: int | None = None
    add_bos: bool | None = None
    before: tuple[str, ...] | None = None


class RoleReader:
    """Finds the roles of one tokenizer.

    Args:
        tokenizer: with its special tokens marked by :func:`mark_special`.
        files: beside it.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, files: SettingsFiles) -> None:
        self._tokenizer, self._files = tokenizer, files
        added = tokenizer.get_added_tokens_decoder().values()
        self._special = {token.content for token in added if token.special}
        self._settings, self._map = files.values(SETTINGS_FILE), files.values(SPECIAL_FILE)
        self._class = class_roles(self._settings.get("tokenizer_class") or files.model.get("model_type"))

    def read(self, marks: Marks) -> Roles:
        """The roles, with what ``marks`` decides otherwise than the tokenizer's own files.

        Raises:
            DataError: no token is known to end a document, the one that is asked for could be in a text, or there is no
                ``bos`` to add.
        """
        before, after = around(self._tokenizer)
        roles = {role: self._role(role) for role in ROLES}
        given = self._named(marks.eos) if marks.eos is not None else self._numbered(marks.eos_id)
        roles["eos"], end = self._end(after, given)
        if (
            roles["bos"] is None
            and "bos_token" not in self._settings
            and before[:1] not in ((), (roles["cls"],), (START,))
        ):
            roles["bos"] = before[0]
        if not before and not after and START in self._special:
            before = USUAL_START
        before = self._with_bos(before, roles["bos"], marks.add_bos)
        exact = marks.before if marks.before is not None else self._settings.get(START_KEY)
        if isinstance(exact, (tuple, list)) and (marks.before is not None or marks.add_bos is None):
            before = tuple(token for token in exact if self._tokenizer.token_to_id(str(token)) is not None)
        if isinstance(flag := self._settings.get("add_eos_token"), bool):
            after = tuple(token for token in after if token != end) + ((end,) if flag else ())
        return Roles(**roles, before=before, after=after, end=end, chat_template=self._chat_template())

    def can_be_spelt(self, token: str) -> bool:
        """Whether some text has this token as one of its words."""
        number = self._tokenizer.token_to_id(token)
        spoken = [] if number is None else [self._tokenizer.decode([number], skip_special_tokens=False)]
        texts = (token, f"a {token} a", *spoken)
        return any(number in self._tokenizer.encode(text, add_special_tokens=False).ids for text in texts)

    def _is_reserved(self, token: str) -> bool:
        if self._tokenizer.token_to_id(token) is None:
            return False
        return token in self._special or not self.can_be_spelt(token)

    def _role(self, role: str) -> str | None:
        """What the files say; what they leave open goes by the class, or by usual names."""
        key = f"{role}_token"
        for values in (self._settings, self._map):
            if key in values:
                return token_content(values[key])
        if self._class is not None:
            token = self._class[role]
            return token if token is not None and self._tokenizer.token_to_id(token) is not None else None
        if self._settings.keys() - _ALONE_LEAVE_OPEN and "tokenizer_class" not in self._settings:
            return None
        return next((name for name in _USUAL[role] if name in self._special), None)

    def _end(self, after: tuple[str, ...], given: str | None) -> tuple[str | None, str]:
        """(the role ``eos``, the token that ends a document): they differ where no file names an end."""
        try:
            eos = self._own_eos()
            end = eos or self._usual_end(after)
        except DataError:
            if given is None:
                raise
            return given, given
        if given is not None and given != end:
            return given, given
        return (eos if self._files.texts else end), end

    def _own_eos(self) -> str | None:
        """The end that the tokenizer's files name; or the model's, where they do not."""
        eos = self._role("eos")
        if eos is None or self._tokenizer.token_to_id(eos) is not None:
            return eos or self._end_by_id()
        if (by_id := self._end_by_id()) is not None:
            return by_id
        raise self._no_end(f"eos_token={eos} is none of its tokens")

    def _end_by_id(self) -> str | None:
        named = map(self._token, self._end_ids())
        return next((token for token in named if token and (token in self._special or token in ENDS)), None)

    def _end_ids(self) -> list[object]:
        """Ids that the model's files give as ends of a text."""
        found: list[object] = []
        for values in (self._files.model, self._files.values(GENERATION_FILE)):
            ids = values.get("eos_token_id")
            found += ids if isinstance(ids, list) else [ids]
        return [number for number in found if number is not None]

    def _token(self, number: object) -> str | None:
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 2**32:
            return None
        return self._tokenizer.id_to_token(number)

    def _usual_end(self, after: tuple[str, ...]) -> str:
        """Where no file names an end: what goes after a text, or a token of a usual name."""
        for name in (*after[-1:], self._role("sep") or "", *ENDS):
            if name and self._is_reserved(name):
                return name
        raise self._no_end("no token of it is known to end a document")

    def _no_end(self, why: str) -> DataError:
        for number in self._end_ids():
            token = self._token(number)
            what = "none of its tokens" if token is None else f"an ordinary word, {token!r}"
            why += f", eos_token_id={number} is {what}"
        remedy = f"name one as eos_token in {SETTINGS_FILE} beside it (megalm prepare: or with --eos)"
        return DataError(f"{why} ({self._has()}); {remedy}")

    def _named(self, eos: str) -> str:
        if self._tokenizer.token_to_id(eos) is None:
            raise DataError(f"--eos {eos}: it has no such token; {self._has()}")
        if eos != self._role("eos") and not self._is_reserved(eos):
            raise DataError(
                f"--eos {eos}: an ordinary word, which would end documents wherever a text has it; {self._has()}"
            )
        return eos

    def _numbered(self, eos_id: int | None) -> str | None:
        if eos_id is None:
            return None
        token = self._token(eos_id)
        if token is None:
            raise DataError(f"eos_id {eos_id}: is none of its tokens; {self._has()}")
        return token

    def _has(self) -> str:
        names = [name for name, _ in sorted(self._tokenizer.get_vocab().items(), key=itemgetter(1))]
        special = [name for name in names if name in self._special]
        more = f", … ({len(special):,} in all)" if len(special) > _SPOKEN_TOKENS else ""
        return f"it has {', '.join(special[:_SPOKEN_TOKENS]) or 'no special tokens at all'}{more}"

    def _with_bos(self, before: tuple[str, ...], bos: str | None, add_bos: bool | None) -> tuple[str, ...]:
        """What goes before a text, with or without ``bos`` if anyone says so."""
        flag = self._settings.get("add_bos_token")
        wanted = add_bos if add_bos is not None or not isinstance(flag, bool) else flag
        if wanted is None:
            return before
        if not wanted:
            return tuple(token for token in before if token != bos)
        if bos is None or self._tokenizer.token_to_id(bos) is None:
            if add_bos is None:  # the library goes on without one, too
                return before
            raise DataError(f"--add-bos: it has no token that begins a text; {self._has()}")
        return before if bos in before else (bos,)

    def _chat_template(self) -> str | None:
        """The file's, or the settings': one template, or the default of several that have names."""
        if TEMPLATE_FILE in self._files.texts:
            return self._files.texts[TEMPLATE_FILE]
        template = self._settings.get("chat_template")
        if isinstance(template, list):
            named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
            template = named.get("default", next(iter(named.values()), None))
        return template if isinstance(template, str) else None


def around(tokenizer: tokenizers.Tokenizer) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What a tokenizer's post-processor puts before and after a text, whichever kind of processor it is."""
    for text in ("a", "0", *islice(tokenizer.get_vocab(with_added_tokens=False), _MOST_PROBES)):
        encoding = tokenizer.encode(text, add_special_tokens=True)
        inside = [place for place, special in enumerate(encoding.special_tokens_mask) if not special]
        if inside:
            names = [tokenizer.id_to_token(number) or "" for number in encoding.ids]
            return tuple(filter(None, names[: inside[0]])), tuple(filter(None, names[inside[-1] + 1 :]))
    return (), ()
