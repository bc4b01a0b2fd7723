"""The Hugging Face architectures that megalm converts. A new one is a :class:`Family`, and a line here."""

from __future__ import annotations

from megalm.config.schema import Model
from megalm.convert.huggingface.bert import BertFamily
from megalm.convert.huggingface.family import Family
from megalm.convert.huggingface.gpt2 import GPT2Family
from megalm.convert.huggingface.llama import LlamaFamily
from megalm.convert.huggingface.neox import NeoXFamily
from megalm.errors import CheckpointError

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (GPT2Family(), NeoXFamily(), LlamaFamily(), BertFamily())
}
"""By ``model_type``; a megalm model is exported as the first family that can hold it."""


def family_of(model: Model) -> Family:
    """The family that can hold a megalm model.

    Raises:
        CheckpointError: none is; with the reasons of each.
    """
    reasons = {family: family.reasons_against(model) for family in FAMILIES.values()}
    for family, against in reasons.items():
        if not against:
            return family
    lines = [f"  {family.title}: {'; '.join(against)}" for family, against in reasons.items()]
    raise CheckpointError("\n".join(["no Hugging Face architecture that megalm converts can hold this model", *lines]))
