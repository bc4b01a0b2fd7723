"""What a finished run leaves for a human: a loss curve, what its perplexity means, and a sample of its text."""

from __future__ import annotations

import sys
from typing import TextIO

from megalm.data.shards.dataset import TOKENIZER_FILE
from megalm.models.counts import resolve_vocab_size
from megalm.runs.folder import LOSS_CURVE_FILE, METRICS_FILE
from megalm.runs.record import read_metrics, step_rows, validation_rows
from megalm.training.callbacks.base import Callback, Outcome, RunContext, describe_error, warn
from megalm.training.callbacks.words import format_number

MOST_SAMPLED_PARAMETERS = 3_000_000_000
"""A larger model is not loaded into one process beside the training state; ``megalm generate`` samples it."""


class ClosingReport(Callback):
    """Once all steps are taken: ``loss.png``, the final validation perplexity, and the prompt continued.

    Args:
        stream: where to write; standard output by default.
    """

    def __init__(self, *, stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stdout
        self._context: RunContext | None = None

    def on_start(self, context: RunContext) -> None:
        """Remember the run."""
        self._context = context

    def on_end(self, outcome: Outcome) -> None:
        """Write the report of a run that is done; a part that fails is one warning and leaves the others alone."""
        if self._context is None or outcome is not Outcome.DONE:
            return
        for part in (self._plot, self._perplexity, self._sample):
            try:
                part(self._context)
            except Exception as error:
                warn(f"report without its {part.__name__.strip('_')}: {describe_error(error)}")

    def _plot(self, context: RunContext) -> None:
        rows = read_metrics(context.run_dir / METRICS_FILE)
        if not context.config.report.plot or not step_rows(rows):
            return
        from megalm.runs.loss_curve import plot_loss

        path = context.run_dir / LOSS_CURVE_FILE
        plot_loss(rows, path, run_name=context.config.run.name)
        self._print(f"curve    {path}")

    def _perplexity(self, context: RunContext) -> None:
        """Of the validation after the last step; an earlier one is no result of the run, and may be of other data."""
        rows = validation_rows(read_metrics(context.run_dir / METRICS_FILE))
        validations = [row for row in rows if row["step"] == context.total_steps]
        if not validations:
            return
        from megalm.data.tokenization.tokenizer import Tokenizer

        last = validations[-1]
        if last["val_loss"] is None:
            self._print("result   no validation perplexity: no token of the validation data carries loss")
            return
        if "val_perplexity" not in last:  # the loss is no cross-entropy of tokens
            self._print(f"result   validation loss {format_number(last['val_loss'], '.4f')}")
            return
        words = Tokenizer.load(context.run_dir / TOKENIZER_FILE).vocab_size
        vocab_size = resolve_vocab_size(context.config.model, words)
        self._print(
            f"result   validation perplexity {format_number(last['val_perplexity'], ',.1f')} "
            f"(untrained: about {vocab_size:,}, the size of the vocabulary)"
        )
        what = "tokens predicted" if context.config.model.causal else "masked tokens recovered"
        self._print(
            f"result   {last['val_accuracy']:.1%} of {what} "
            f"(always guessing the commonest token: {last['val_commonest']:.1%})"
        )

    def _sample(self, context: RunContext) -> None:
        report = context.config.report
        if report.prompt is None:
            return
        if context.parameters > MOST_SAMPLED_PARAMETERS:
            self._print(f"sample   megalm generate {context.run_dir} --prompt TEXT (too large a model to sample here)")
            return
        from megalm.generate.run import run_generate

        text = run_generate(
            context.run_dir,
            report.prompt,
            max_new_tokens=report.max_new_tokens,
            temperature=report.temperature,
            top_k=report.top_k,
            seed=context.config.run.seed,
        )
        self._print(f"sample   the model continues {report.prompt!r}:")
        self._print("")
        for line in text.splitlines():
            self._print(f"    {line}")

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)
