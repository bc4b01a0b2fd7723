"""Rules about what is learnt, by which kind of model."""

from __future__ import annotations

from collections.abc import Iterator

from megalm.config.job import Job, Rule
from megalm.config.violation import Fix, Violation


def objective_fits_attention(job: Job) -> Iterator[Violation]:
    """Next tokens are predicted by a model that does not see them; masked ones by a model that sees both sides."""
    objective, causal = job.config.objective.name, job.config.model.causal
    if objective in ("clm", "sft") and not causal:
        yield Violation(
            "model.causal",
            causal,
            f"every token would see the next one, which objective.name={objective} asks it for",
            fixes=(Fix("model.causal", (True,)), Fix("objective.name", ("mlm",))),
        )
    if objective == "mlm" and causal:
        yield Violation(
            "model.causal",
            causal,
            "objective.name=mlm recovers a masked token from both sides",
            fixes=(Fix("model.causal", (False,)), Fix("objective.name", ("clm",))),
        )


def completions_are_marked(job: Job) -> Iterator[Violation]:
    """Supervised fine-tuning needs data that say what is a completion."""
    if job.config.objective.name == "sft" and job.datasets and not any(dataset.masked for dataset in job.datasets):
        yield Violation(
            "objective.name",
            "sft",
            "no dataset of data.path has a loss mask, so prompts would carry loss like completions",
            "data of `megalm prepare --corpus sft`",
            fixes=(Fix("objective.name", ("clm",)),),
        )


def prompts_are_for_decoders(job: Job) -> Iterator[Violation]:
    """A closing sample continues a text, which an encoder does not."""
    if not job.config.model.causal and job.config.report.prompt is not None:
        yield Violation(
            "report.prompt",
            job.config.report.prompt,
            "model.causal=false continues no text",
            fixes=(Fix("report.prompt", (None,)),),
        )


RULES: tuple[Rule, ...] = (
    objective_fits_attention,
    completions_are_marked,
    prompts_are_for_decoders,
)
