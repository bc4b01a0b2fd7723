"""A conversation at the terminal. No torch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TextIO

from megalm.data.tokenization.tokenizer import Tokenizer
from megalm.errors import ConfigError, DataError
from megalm.generate.asked import AskedModel
from megalm.generate.prompts import DEFAULT_NEW_TOKENS, Settings

HELP = "Ctrl-D ends, /new begins another conversation"

ReadLine = Callable[[], str]
"""The user's next turn; raises EOFError when there is none."""


def check_chat(tokenizer: Tokenizer, settings: Settings, system: str | None) -> None:
    """Refuse what no conversation can be led with.

    Raises:
        ConfigError: settings that give other than one text.
        DataError: the tokenizer has neither a chat template nor marks of turns, or refuses the system message.
    """
    problems = [
        f"{name}={value}: a conversation goes on from one text; {name}=1"
        for name, value in (("samples", settings.samples), ("beams", settings.beams))
        if value > 1
    ]
    if problems:
        raise ConfigError(problems)
    tokenizer.encode_conversation([*_opening(system), {"role": "user", "content": "…"}])


def converse(
    model: AskedModel, settings: Settings, *, system: str | None, read_line: ReadLine, out: TextIO = sys.stdout
) -> None:
    """Take turns with the user until there are no more lines."""
    messages = _opening(system)
    while True:
        try:
            line = read_line()
        except EOFError:
            return
        if not line.strip():
            continue
        if line.strip() == "/new":
            messages = _opening(system)
            continue
        messages.append({"role": "user", "content": line})
        try:
            answer = _answer(model, messages, settings, out)
        except (ConfigError, DataError) as error:  # of this turn alone
            print(error, file=sys.stderr)
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": answer})


def read_from_terminal() -> str:
    """A line, behind a prompt where there is a terminal."""
    return input("> " if sys.stdin.isatty() and sys.stdout.isatty() else "")


def _opening(system: str | None) -> list[dict[str, str]]:
    return [] if system is None else [{"role": "system", "content": system}]


def _answer(model: AskedModel, messages: list[dict[str, str]], settings: Settings, out: TextIO) -> str:
    """The assistant's turn, shown as it grows; forgets the oldest turns where there is no room for all."""
    longest = model.config.model.sequence_length
    wanted = min(settings.max_new_tokens or DEFAULT_NEW_TOKENS, longest // 2)
    tokens = model.tokenizer.encode_conversation(messages)
    first = 1 if messages[0]["role"] == "system" else 0
    forgotten = 0
    while len(tokens) + wanted > longest and len(messages) - first > 2:
        del messages[first : first + 2]
        forgotten += 2
        tokens = model.tokenizer.encode_conversation(messages)
    if forgotten:
        print(f"(forgot {forgotten} turns: model.sequence_length={longest} has no room for them)", file=sys.stderr)

    def show(request: int, sample: int, piece: str) -> None:  # noqa: ARG001 - one request, one sample
        out.write(piece)
        out.flush()

    completions = model.generate([settings.request(tokens, longest)], on_text=show)
    out.write("\n")
    out.flush()
    return completions[0][0].text.strip()
