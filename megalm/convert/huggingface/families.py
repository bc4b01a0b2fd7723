"""The Hugging Face architectures that megalm converts. A new one is a :class:`Family`, and a line here."""

from __future__ import annotations

from megalm.config.schema import Model
from megalm.convert.huggingface.bert import BertFamily
from megalm.convert.huggingface.distilbert import DistilBertFamily
from megalm.convert.huggingface.family import Family
from megalm.convert.huggingface.gpt2 import GPT2Family
from megalm.convert.huggingface.llama import LlamaFamily
from megalm.convert.huggingface.mistral import MistralFamily
from megalm.convert.huggingface.neox import NeoXFamily
from megalm.convert.huggingface.phi3 import Phi3Family
from megalm.convert.huggingface.qwen import Qwen2Family, Qwen3Family
from megalm.convert.huggingface.roberta import RobertaFamily, XLMRobertaFamily
from megalm.convert.huggingface.starcoder2 import StarCoder2Family
from megalm.errors import CheckpointError

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        GPT2Family(),
        NeoXFamily(),
        LlamaFamily(),
        MistralFamily(),
        Qwen2Family(),
        Qwen3Family(),
        Phi3Family(),
        StarCoder2Family(),
        BertFamily(),
        RobertaFamily(),
        XLMRobertaFamily(),
        DistilBertFamily(),
    )
}
"""By ``model_type``; a megalm model is exported as the first family that can hold it."""


def family_of(model: Model, architecture: str = "") -> Family:
    """The family that can hold a megalm model.

    Args:
        model: the model.
        architecture: the ``model_type`` that its weights once had, which is preferred; empty: none.

    Raises:
        CheckpointError: none can; with the reasons of each.
    """
    reasons = {family: family.reasons_against(model) for family in FAMILIES.values()}
    for family in sorted(reasons, key=lambda family: family.model_type != architecture):
        if not reasons[family]:
            return family
    lines = [f"  {family.title}: {'; '.join(against)}" for family, against in reasons.items()]
    raise CheckpointError("\n".join(["no Hugging Face architecture that megalm converts can hold this model", *lines]))
