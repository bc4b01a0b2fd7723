"""The commonest templates whose text a reader reads: by name, in English and in the languages of larger Wikipedias."""

from __future__ import annotations

from megalm.data.prepare.corpora.wikitext.templates.call import Call
from megalm.data.prepare.corpora.wikitext.templates.table import render_template

__all__ = ["Call", "render_template"]
