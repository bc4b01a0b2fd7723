"""RoBERTa (Liu et al. 2019) and XLM-R (Conneau et al. 2020): BERT, its positions numbered from the padding's id + 1.

The first rows of the position embedding, as many as ``model.position_offset``, belong to no token: the library computes
with the last of them at padding alone, which megalm's sequences have not. They are kept as they are.
"""

from __future__ import annotations

from typing import Any

from megalm.config.schema import Model
from megalm.convert.huggingface.bert import ENCODER, BertFamily, HeadNames
from megalm.convert.huggingface.family import unlike, unlike_any
from megalm.convert.untrusted.json_fields import Fields


class RobertaFamily(BertFamily):
    """``RobertaForMaskedLM``. Its head computes the exact GELU, whatever ``hidden_act`` says."""

    model_type = "roberta"
    title = "RoBERTa"
    architecture = "RobertaForMaskedLM"
    prefix = "roberta."
    head_prefixes = ("lm_head.",)
    ignored = (r"roberta\.embeddings\.(position_ids|token_type_ids)",)
    left_out = {r"roberta\.pooler\..*": "the pooler of the first token"}  # noqa: RUF012 - a ClassVar in the base class
    head = HeadNames("lm_head.dense", "lm_head.layer_norm", "lm_head")

    def model_from_config(self, fields: Fields) -> Model:
        """See the base class."""
        fields.must_be("hidden_act", "gelu", "the head computes the exact GELU, and megalm's what its blocks compute")
        return super().model_from_config(fields)

    def positions(self, fields: Fields) -> dict[str, Any]:
        """See the base class."""
        if fields.is_null("pad_token_id"):
            fields.problem("pad_token_id", "null, and positions are numbered from it; RoBERTa's is 1")
        offset = fields.count("pad_token_id", 1, smallest=0) + 1
        rows = fields.count("max_position_embeddings", 512)
        if rows <= offset:
            fields.problem("max_position_embeddings", f"no more than the {offset} rows before the first position")
        return {"position_offset": offset, "sequence_length": max(rows - offset, 1)}

    def reasons_against(self, model: Model) -> list[str]:
        """See the base class."""
        reasons = unlike(model, causal=False, activation="gelu_erf", **ENCODER, num_kv_heads=(model.num_heads, None))
        reasons += [
            f"model.{name}=0, not 1 or more" for name in ("token_types", "position_offset") if not getattr(model, name)
        ]
        return reasons + unlike_any(model, "position_offset")

    def config_from_model(self, model: Model) -> dict[str, Any]:
        """See the base class."""
        rows = model.position_offset + model.sequence_length
        return super().config_from_model(model) | {"max_position_embeddings": rows}

    def fixed_ids(self, model: Model) -> dict[str, int]:
        """The padding, from which positions are numbered."""
        return {"pad_token_id": model.position_offset - 1}


class XLMRobertaFamily(RobertaFamily):
    """``XLMRobertaForMaskedLM``: RoBERTa's architecture and names, with another vocabulary."""

    model_type = "xlm-roberta"
    title = "XLM-R"
    architecture = "XLMRobertaForMaskedLM"
