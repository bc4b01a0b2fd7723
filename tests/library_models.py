"""Small models as the transformers library makes and saves them, of each architecture that megalm converts.

Sizes are odd on purpose (widths that are no powers of two, heads apart from them, grouped key/value heads), and all
weights random, biases and norms too, so that no tensor can stand in for another.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

VOCAB = 101
LENGTH = 32


@dataclass(frozen=True)
class LibraryModel:
    """One model of the library.

    Attributes:
        config: its config's class, without ``Config``.
        kind: its class.
        fields: of the config, beside what all have.
    """

    config: str
    kind: str
    fields: dict[str, Any] = field(default_factory=dict)

    def with_fields(self, **fields: Any) -> LibraryModel:
        return LibraryModel(self.config, self.kind, self.fields | fields)


def _decoder(name: str, **fields: Any) -> LibraryModel:
    sizes = {
        "num_hidden_layers": 3,
        "hidden_size": 40,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 56,
        "max_position_embeddings": LENGTH,
        "initializer_range": 0.2,
    }
    return LibraryModel(name, f"{name}ForCausalLM", sizes | fields)


def _encoder(name: str, **fields: Any) -> LibraryModel:
    sizes = {
        "num_hidden_layers": 3,
        "hidden_size": 40,
        "num_attention_heads": 4,
        "intermediate_size": 56,
        "max_position_embeddings": LENGTH + 2,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
        "initializer_range": 0.2,
    }
    return LibraryModel(name, f"{name}ForMaskedLM", sizes | fields)


_LLAMA, _MISTRAL, _QWEN2, _QWEN3 = (_decoder(name) for name in ("Llama", "Mistral", "Qwen2", "Qwen3"))
_PHI3 = _decoder(
    "Phi3",
    pad_token_id=None,
    bos_token_id=1,
    eos_token_id=2,
    rms_norm_eps=1e-5,
    original_max_position_embeddings=LENGTH,
)
_STARCODER2 = _decoder("Starcoder2", bos_token_id=0, eos_token_id=0)
_ROBERTA = _encoder("Roberta")
_DISTILBERT = LibraryModel(
    "DistilBert",
    "DistilBertForMaskedLM",
    {
        "n_layers": 3,
        "dim": 40,
        "n_heads": 4,
        "hidden_dim": 56,
        "max_position_embeddings": LENGTH,
        "initializer_range": 0.2,
    },
)
_SOME_LAYERS = ["full_attention", "sliding_attention", "full_attention"]

MODELS: dict[str, LibraryModel] = {
    "llama": _LLAMA,
    "llama-head_dim": _LLAMA.with_fields(head_dim=6),
    "llama-attention_bias": _LLAMA.with_fields(attention_bias=True, tie_word_embeddings=True),
    "llama-mlp_bias": _LLAMA.with_fields(mlp_bias=True),
    "llama-both_biases": _LLAMA.with_fields(attention_bias=True, mlp_bias=True),
    "mistral": _MISTRAL.with_fields(sliding_window=7),
    "mistral-nemo": _MISTRAL.with_fields(sliding_window=None, head_dim=16, rope_parameters={"rope_theta": 1e6}),
    "mistral-tied": _MISTRAL.with_fields(sliding_window=LENGTH, tie_word_embeddings=True),
    "qwen2": _QWEN2.with_fields(tie_word_embeddings=True),
    "qwen2-windows": _QWEN2.with_fields(use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen2-all_windows": _QWEN2.with_fields(use_sliding_window=True, sliding_window=5, max_window_layers=0),
    "qwen2-yarn": _QWEN2.with_fields(
        rope_parameters={"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}
    ),
    "qwen3": _QWEN3.with_fields(head_dim=16, tie_word_embeddings=True),
    "qwen3-windows": _QWEN3.with_fields(
        head_dim=6, use_sliding_window=True, sliding_window=5, max_window_layers=1, layer_types=_SOME_LAYERS
    ),
    "qwen3-biases": _QWEN3.with_fields(head_dim=10, attention_bias=True, rms_norm_eps=1e-2),
    "phi3": _PHI3.with_fields(sliding_window=9, resid_pdrop=0.1, embd_pdrop=0.1, attention_dropout=0.2),
    "phi3-partial": _PHI3.with_fields(
        rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.6},
        tie_word_embeddings=True,
    ),
    "starcoder2": _STARCODER2.with_fields(sliding_window=9, residual_dropout=0.1, embedding_dropout=0.1),
    "starcoder2-untied": _STARCODER2.with_fields(tie_word_embeddings=False, hidden_act="gelu", norm_epsilon=1e-2),
    "starcoder2-no_biases": _STARCODER2.with_fields(use_bias=False),
    "neox-attention_bias": LibraryModel(
        "GPTNeoX",
        "GPTNeoXForCausalLM",
        {
            "num_hidden_layers": 2,
            "hidden_size": 40,
            "num_attention_heads": 4,
            "intermediate_size": 56,
            "max_position_embeddings": LENGTH,
            "attention_bias": False,
            "rotary_pct": 0.4,
            "initializer_range": 0.2,
        },
    ),
    "roberta": _ROBERTA,
    "roberta-untied": _ROBERTA.with_fields(tie_word_embeddings=False, type_vocab_size=2),
    "roberta-padding": _ROBERTA.with_fields(pad_token_id=5, max_position_embeddings=LENGTH + 6),
    "xlm-roberta": _encoder("XLMRoberta"),
    "distilbert": _DISTILBERT,
    "distilbert-untied": _DISTILBERT.with_fields(tie_word_embeddings=False, activation="gelu_new"),
    "distilbert-sinusoidal": _DISTILBERT.with_fields(sinusoidal_pos_embds=True),
}
"""By what a test calls them."""

ONE_OF_EACH = (
    "mistral",
    "mistral-nemo",
    "qwen2",
    "qwen3",
    "phi3",
    "starcoder2",
    "roberta",
    "xlm-roberta",
    "distilbert",
)
"""One of each architecture, for tests over many layouts."""


def make(name: str, **fields: Any) -> Any:
    """A model of the library, in evaluation; ``fields`` are what its config has otherwise."""
    import transformers

    described = MODELS[name]
    config = getattr(transformers, f"{described.config}Config")(**{"vocab_size": VOCAB, **described.fields, **fields})
    torch.manual_seed(sum(map(ord, name)))
    with torch.no_grad():
        model = getattr(transformers, described.kind)(config).eval()
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    return model


def save(name: str, folder: Path) -> Any:
    """The same, also saved as the library does."""
    model = make(name)
    model.save_pretrained(folder)
    return model


def tokens(padding: int | None = None, length: int = LENGTH) -> torch.Tensor:
    """Sequences of random tokens, [3, S], without padding."""
    drawn = torch.randint(VOCAB, (3, length), generator=torch.Generator().manual_seed(1))
    return drawn if padding is None else torch.where(drawn == padding, (padding + 1) % VOCAB, drawn)
