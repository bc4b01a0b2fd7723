"""EleutherAI's lm-evaluation-harness on megalm's models: ``python -m megalm.evaluate.lm_eval``.

It takes ``lm_eval``'s own arguments, with one more model:

    python -m megalm.evaluate.lm_eval --model megalm --model_args path=runs/NAME,tp=2,pp=1 --tasks lambada_openai

``model_args`` are ``path`` (a run, or one of its checkpoints), the layout ``tp``, ``pp`` and ``ranks`` (replicas share
the requests), ``dtype``, ``device``, ``max_length`` (shorter than the model's), ``max_gen_toks`` (256) and
``add_bos_token``. Contexts and continuations are tokenised as the harness has it: together, and parted by the length of
the context's own tokens; where that leaves nothing of the continuation, since a token crosses the border, where the
tokens depart from the context's. Marks of the chat template are tokens in every text, and a text that already begins as
a document does gets no second beginning. What is longer than the model's sequences loses its beginning, as with
``--model hf``; how often is said at the end. Generation is greedy unless a temperature is named.

Tested with lm-eval 0.4.13.
"""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from megalm.config.violation import format_value
from megalm.data.tokenization.chat import ASSISTANT, TemplateRefusal
from megalm.data.tokenization.tokenizer import Tokenizer
from megalm.errors import ConfigError, DataError
from megalm.evaluate.tasks.requests import alike_from_start
from megalm.generate.asked import BATCH_SIZE, AskedModel
from megalm.generate.open import start
from megalm.generate.requests import LARGEST_SEED, Completion, GenerateRequest, Sampling, Score, ScoreRequest
from megalm.launch.guard import guarded
from megalm.runs.find import find_model

_SAMPLED = {"temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"}
_IGNORED = {"do_sample", "until", "max_gen_toks", "num_beams", "length_penalty"}
"""Settings of generation that are read under another name."""

Pair = tuple[tuple[str, str], list[int], list[int]]


@register_model("megalm")
class MegalmLM(TemplateLM):
    """A trained run of megalm, on as many ranks as its layout has.

    Args:
        path: folder of a run, its name in ``runs/``, or one of its checkpoints.
        tp: tensor-parallel degree.
        pp: pipeline-parallel degree.
        ranks: processes; 0: tp·pp.
        dtype: of the weights; None: as the run computes.
        device: ``cpu``; any other: GPUs where there is one for each rank, else the CPU.
        batch_size: rows that a replica computes together.
        max_length: most tokens of context and continuation; None: the model's.
        max_gen_toks: most tokens to generate, where a task names no number.
        add_bos_token: whether texts begin with the tokenizer's token for it; None: as documents of its data do.
        max_batch_size: the harness's own; not used.
        others: refused.

    Raises:
        ConfigError: an argument is wrong, or the folder is no run.
    """

    def __init__(
        self,
        path: str = "",
        tp: int = 1,
        pp: int = 1,
        ranks: int = 0,
        dtype: str | None = None,
        device: str | None = None,
        batch_size: int | str = BATCH_SIZE,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        max_batch_size: int | None = None,  # noqa: ARG002
        **others: Any,
    ) -> None:
        super().__init__()
        known = "path, tp, pp, ranks, dtype, device, batch_size, max_length, max_gen_toks and add_bos_token"
        if others:
            raise ConfigError([f"model_args: {name}: megalm has no such argument; {known}" for name in others])
        if not path:
            raise ConfigError("model_args: no path; path=runs/NAME")
        overrides = [f"parallel.tp={tp}", f"parallel.pp={pp}", f"launch.ranks={ranks}"]
        overrides += [f"engine.dtype={dtype}"] if dtype is not None else []
        # The harness names a GPU by default, also where there is none.
        overrides += [f"launch.device={'cpu' if device == 'cpu' else 'auto'}"] if device is not None else []
        found = find_model(path, overrides)
        found.check_causal()
        longest = found.config.model.sequence_length
        if max_length is not None and not 1 <= max_length <= longest:
            raise ConfigError(f"max_length={max_length}: from 1 to {longest} (model.sequence_length)")
        self.batch_size = _batch_size(batch_size)
        self.max_length, self.max_gen_toks = max_length or longest, max_gen_toks
        self._tokenizer = found.tokenizer
        self._begins = bool(found.tokenizer.before_ids) if add_bos_token is None else add_bos_token
        self._converses = _converses(found.tokenizer)
        self._cut = 0
        self.model = AskedModel(found, start(found, overrides), batch_size=self.batch_size)

    @property
    def eot_token_id(self) -> int:
        """What ends a document."""
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        before = self._tokenizer.role_id("bos")
        return self.eot_token_id if before is None else before

    @property
    def tokenizer_name(self) -> str:
        """What caches of requests tell tokenizers apart by."""
        return f"megalm-{self._tokenizer.sha256[:16]}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:  # noqa: ARG002
        """Tokens of a text, behind what begins a document where such texts begin so; a template may have written it."""
        begins = self._begins if add_special_tokens is None else add_special_tokens
        before = self._tokenizer.before_ids
        tokens = self._tokenizer.encode_marked(string) if self._converses else self._tokenizer.encode(string)
        return [*before, *tokens] if begins and tuple(tokens[: len(before)]) != before else tokens

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Source of the tokenizer's template, for the harness's record; None: it is not asked for."""
        return self._tokenizer.conversations.template.source if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the run's template writes it; without the prompt, up to what its last message says.

        Raises:
            DataError: there is no template, or it refuses the conversation.
        """
        template = self._tokenizer.conversations.template
        try:
            text = template.text(chat_history, add_generation_prompt=add_generation_prompt)
        except TemplateRefusal as reason:
            raise DataError(f"{reason}; another template, or other messages (--system_instruction)") from None
        if add_generation_prompt or not chat_history or chat_history[-1]["role"] != ASSISTANT:
            return text
        # The harness puts the beginning of an answer last, which the model is to go on with.
        said = chat_history[-1]["content"].strip()
        return text[: text.rindex(said) + len(said)] if said in text else text

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        before, after = super()._encode_pair(context, continuation)
        if after:
            return before, after
        whole = self.tok_encode(context + continuation)
        shared = alike_from_start(before, whole)
        return whole[:shared] or [self.prefix_token_id], whole[shared:]

    def _loglikelihood_tokens(
        self,
        requests: list[Pair],
        disable_tqdm: bool = False,
        **kwargs: Any,  # noqa: ARG002
    ) -> list[tuple[float, bool]]:
        scores = self._scores([(context, continuation) for _, context, continuation in requests], disable_tqdm)
        answers = [(score.total, score.is_greedy) for score in scores]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, in windows that predict every token once."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in map(make_disjoint_window, rolling):
                windows.append(window)
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, score in zip(owners, self._scores(windows, disable_tqdm), strict=True):
            totals[owner] += score.total
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts up to a stop text, the end of a document, or a number of tokens."""
        asked = _each_drawn(self._generation(*request.args) for request in requests)
        texts = [""] * len(requests)
        # The longest first, so that memory runs out at once or never.
        order = sorted(range(len(asked)), key=lambda number: (-len(asked[number].tokens), number))
        with tqdm(total=len(asked), disable=disable_tqdm, desc="Running generate_until requests") as bar:

            def done(place: int, completions: list[Completion]) -> None:
                number = order[place]
                texts[number] = completions[0].text
                self.cache_hook.add_partial("generate_until", requests[number].args, texts[number])
                bar.update(1)

            self.model.generate([asked[number] for number in order], on_done=done)
        self._tell_cut()
        return texts

    def _generation(self, context: str, settings: dict[str, Any]) -> GenerateRequest:
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(settings, self.max_gen_toks))
        stop = handle_stop_sequences(kwargs.get("until"), eos=None)
        if unknown := sorted(set(kwargs) - _SAMPLED - _IGNORED):
            raise ConfigError([f"gen_kwargs: {name}={kwargs[name]!r}: not a setting of megalm's" for name in unknown])
        new = int(kwargs["max_gen_toks"])
        if new >= self.max_length:
            raise ConfigError(
                f"max_gen_toks={new}: leaves no room for a context; below {self.max_length} (max_length), by "
                "--gen_kwargs max_gen_toks=N, or by --model_args max_gen_toks=N for tasks that name no number"
            )
        tokens = self.tok_encode(context) or [self.prefix_token_id]
        room = self.max_length - new
        self._cut += len(tokens) > room
        return GenerateRequest(
            tokens=tuple(tokens[-room:]),
            max_new_tokens=new,
            sampling=_sampling(kwargs),
            stop=tuple(text for text in stop if text),
            beams=int(kwargs.get("num_beams", 1)),
            length_penalty=float(kwargs.get("length_penalty", 1.0)),
        )

    def _scores(self, pairs: Sequence[tuple[list[int], list[int]]], disable_tqdm: bool) -> list[Score]:
        requests = []
        for context, continuation in pairs:
            room = self.max_length + 1 - len(continuation)
            if room < 1:
                raise ConfigError(
                    f"a continuation of {len(continuation)} tokens; at most {self.max_length} (max_length)"
                )
            self._cut += len(context) > room
            requests.append(ScoreRequest(context=tuple(context[-room:]), continuation=tuple(continuation)))
        different = list(dict.fromkeys(requests))
        with tqdm(total=len(different), disable=disable_tqdm, desc="Running loglikelihood requests") as bar:
            scores = dict(zip(different, self.model.score(different, progress=bar.update), strict=True))
        self._tell_cut()
        return [scores[request] for request in requests]

    def _tell_cut(self) -> None:
        if self._cut:
            print(f"{self._cut} requests lost their beginning: more tokens than {self.max_length}", file=sys.stderr)
            self._cut = 0


def _sampling(kwargs: Mapping[str, Any]) -> Sampling:
    """Greedy, unless a temperature is named: the harness takes it for 0, and says so where ``do_sample`` is set."""
    named = {name: value for name, value in kwargs.items() if name in _SAMPLED and value is not None}
    settings: dict[str, Any] = {"temperature": 0.0, **named}
    if wrong := [name for name, value in settings.items() if type(value) not in (int, float)]:
        raise ConfigError([f"gen_kwargs: {name}={format_value(settings[name])}: not a number" for name in wrong])
    if settings["temperature"] > 0 and int(kwargs.get("num_beams", 1)) > 1:
        raise ConfigError(
            f"gen_kwargs: num_beams={kwargs['num_beams']}: beam search draws nothing; do_sample=False, or num_beams=1"
        )
    settings |= {name: int(settings[name]) for name in ("top_k", "seed") if name in settings}
    return Sampling(**settings)


def _each_drawn(requests: Iterable[GenerateRequest]) -> list[GenerateRequest]:
    """The requests, each repetition of one with a seed of its own: a task's ``repeats`` are to be different texts."""
    seen: Counter[GenerateRequest] = Counter()
    made = []
    for request in requests:
        count = seen[request]
        seen[request] += 1
        if count and request.sampling.temperature > 0:
            digest = hashlib.sha256(f"{request.sampling.seed}/{count}".encode()).digest()
            seed = int.from_bytes(digest[:8], "big") % LARGEST_SEED
            made.append(replace(request, sampling=replace(request.sampling, seed=seed)))
        else:
            made.append(request)
    return made


def _converses(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer has marks of conversations."""
    try:
        return bool(tokenizer.conversations)
    except DataError:
        return False


def _batch_size(value: int | str) -> int:
    """A number; ``auto`` and ``auto:N`` take the default, since memory is bounded by tokens per pass."""
    if str(value).startswith("auto"):
        return BATCH_SIZE
    if not str(value).isdecimal() or int(value) < 1:
        raise ConfigError(f"batch_size={value}: no number of rows; 1 or above, or auto")
    return int(value)


def main() -> int:
    """Run ``lm_eval``'s own command line."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except ValueError as error:
        if "not found" not in str(error):
            raise
        raise ConfigError(f"--tasks: {error}; `python -m megalm.evaluate.lm_eval ls tasks` lists them") from None
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
