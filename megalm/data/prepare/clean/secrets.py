"""Replaces secrets by a placeholder: private keys, and access tokens of services, which have a form of their own.

The forms are those of detect-secrets' plugins for services, and of :mod:`secret_forms` for services that it does not
know or whose tokens have grown. Its entropy and keyword plugins are left out: in prose they find little but words.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol

from megalm.data.prepare.clean.secret_forms import FORMS, NEAR_RUNS
from megalm.errors import DataError

PLACEHOLDER = "<SECRET>"

_LIBRARY = {
    "artifactory.ArtifactoryDetector": ("AKC", "AP"),
    "aws.AWSKeyDetector": ("A3T", "ABIA", "ACCA", "AKIA", "ASIA", "aws"),
    "azure_storage_key.AzureStorageKeyDetector": ("AccountKey=",),
    "basic_auth.BasicAuthDetector": ("://",),
    "cloudant.CloudantDetector": ("cl",),
    "discord.DiscordBotTokenDetector": (".",),
    "github_token.GitHubTokenDetector": ("gh",),
    "gitlab_token.GitLabTokenDetector": ("gl", "GR1348941"),
    "ibm_cloud_iam.IbmCloudIamDetector": ("key", "pwd", "pass", "token"),
    "ibm_cos_hmac.IbmCosHmacDetector": ("secret",),
    "jwt.JwtTokenDetector": ("eyJ",),
    "mailchimp.MailchimpDetector": ("-us",),
    "openai.OpenAIDetector": ("T3BlbkFJ",),
    "pypi_token.PypiTokenDetector": ("pypi-",),
    "sendgrid.SendGridDetector": ("SG.",),
    "slack.SlackDetector": ("xox", "hooks.slack.com"),
    "softlayer.SoftlayerDetector": ("sl",),
    "square_oauth.SquareOAuthDetector": ("sq0csp-",),
    "stripe.StripeDetector": ("k_live_",),
    "telegram_token.TelegramBotTokenDetector": (":",),
    "twilio.TwilioKeyDetector": ("AC", "SK"),
}
"""Plugins of services ▶ what a text holds, of which one, before it is worth a search; small letters stand for any case.

That for npm is not among them: what it matches goes on to the end of the line.
"""
_NEAR_RUNS = frozenset(
    [
        "cloudant",
        "discord",
        "github_token",
        "gitlab_token",
        "ibm_cloud_iam",
        "ibm_cos_hmac",
        "mailchimp",
        "softlayer",
        "telegram_token",
        "twilio",
    ]
)
"""Plugins whose hints most texts hold: they search only around long runs of letters and digits, which prose has not."""
_MIXED = frozenset({"artifactory", "ibm_cloud_iam"})
"""Plugins that would also take a long word or the name of a function: what they find has a digit and a letter."""
_RUN = re.compile(r"[A-Za-z0-9_-]{24,}")
_AROUND_RUN = 120
"""What may stand before a run, and is part of an expression: a name, an assignment, the host of an address."""
_AROUND, _BEHIND = " \t\r\n\"'=", " \t\r\n\"'"
"""What some expressions take along that is no part of a secret."""
_REST = re.compile(r"[A-Za-z0-9_-]*")
_WORD = re.compile(r"[A-Za-z0-9_-]")

_PEM = re.compile(
    r"(?P<dashes>-{4,5}) ?BEGIN (?P<what>[A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?) ?-{4,5}"
    r"(?:(?:(?!-BEGIN |- BEGIN ).){0,200000}?-{4,5} ?END (?P=what) ?-{4,5}"
    r"|(?:(?:\\[nrt]|[\s>#*|\"',+])*[A-Za-z0-9+/=]{16,})*(?:(?:\\[nrt]|[\s>#*|\"',+])*[A-Za-z0-9+/]{1,15}={0,2}(?=[\s\\\"']|$))?)",
    re.DOTALL,
)
"""RFC 7468 and the like: from BEGIN to END; where that is missing, to the end of what is base64."""
_PUTTY = re.compile(r"PuTTY-User-Key-File-\d:.{0,200000}?(?:Private-MAC: ?[0-9a-f]+|\Z)", re.DOTALL)


class Detector(Protocol):
    """What a plugin of detect-secrets offers: a name, and expressions for what it finds."""

    secret_type: str
    denylist: Iterable[re.Pattern[str]]


@dataclass(frozen=True)
class _Text:
    """A text, and what decides which detectors search it.

    Attributes:
        text: all of it.
        lowered: the same in small letters.
        windows: (start, end) of what is around long runs of letters and digits.
    """

    text: str
    lowered: str
    windows: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, text: str) -> _Text:
        """Look at a text."""
        windows: list[tuple[int, int]] = []
        for match in _RUN.finditer(text):
            start, end = max(match.start() - _AROUND_RUN, 0), min(match.end() + _AROUND_RUN, len(text))
            if windows and start <= windows[-1][1]:
                start = windows.pop()[0]
            windows.append((start, end))
        return cls(text, text.lower(), tuple(windows))

    def has(self, hint: str) -> bool:
        """Whether it holds a hint; one in small letters in any case."""
        return hint in (self.lowered if hint.islower() else self.text)


@dataclass(frozen=True)
class _Search:
    """One detector, and when it is worth asking.

    Attributes:
        kind: as reports call what it finds.
        patterns: of it.
        hints: a text holds one of these.
        near_runs: it searches only around long runs of letters and digits.
        mixed: what it finds has a digit and a letter.
        begins_word: what it finds has no letter, digit, _ or - before it.
    """

    kind: str
    patterns: tuple[re.Pattern[str], ...]
    hints: tuple[str, ...]
    near_runs: bool = False
    mixed: bool = False
    begins_word: bool = False

    def spans(self, text: _Text) -> Iterator[tuple[int, int, str]]:
        """(start, end, kind) of each secret: the whole match, and what follows of the same token."""
        if not any(map(text.has, self.hints)):
            return
        for start, end in text.windows if self.near_runs else ((0, len(text.text)),):
            for pattern in self.patterns:
                for match in pattern.finditer(text.text, start, end):
                    if self._is_one(match):
                        yield *_extent(match), self.kind

    def _is_one(self, match: re.Match[str]) -> bool:
        if self.mixed and not (any(map(str.isdigit, match[0])) and any(map(str.isalpha, match[0]))):
            return False
        return not (self.begins_word and _WORD.match(match.string[max(match.start() - 1, 0) : match.start()]))


def _extent(match: re.Match[str]) -> tuple[int, int]:
    """Without quotes and spaces around it, and with all of its token: services make theirs longer than they were."""
    text, end = match.string, match.end()
    if text[end - 1 : end].isalnum() and (rest := _REST.match(text, end)):
        end = rest.end()
    start = match.start() + len(match[0]) - len(match[0].lstrip(_AROUND))
    return start, start + len(text[start:end].rstrip(_BEHIND))


class Secrets:
    """Finds secrets; made once per process.

    Raises:
        DataError: detect-secrets is not installed.
    """

    def __init__(self) -> None:
        self._searches = [*_own_searches(), *_library_searches()]

    def scrub(self, text: str, notes: Counter[str]) -> str:
        """Text with placeholders; ``notes`` counts the secrets by kind."""
        spans = sorted(self._spans(text), key=lambda span: (span[0], -span[1]))
        if not spans:
            return text
        parts, end = [], 0
        for start, stop, kind in spans:
            if start >= end:
                parts += [text[end:start], PLACEHOLDER]
                notes[f"secret: {kind}"] += 1
            end = max(end, stop)
        return "".join([*parts, text[end:]])

    def _spans(self, text: str) -> Iterator[tuple[int, int, str]]:
        looked_at = _Text.of(text)
        if looked_at.has("private key") or looked_at.has("putty-user-key-file"):
            for pattern in (_PEM, _PUTTY):
                yield from ((*match.span(), "private key") for match in pattern.finditer(text))
        for search in self._searches:
            yield from search.spans(looked_at)


def _own_searches() -> list[_Search]:
    return [
        _Search(kind, (re.compile(pattern),), hints, kind in NEAR_RUNS, begins_word=True)
        for kind, pattern, hints in FORMS
    ]


def _library_searches() -> list[_Search]:
    searches = []
    for name, hints in _LIBRARY.items():
        module, _, class_name = name.partition(".")
        try:
            detector: Detector = getattr(import_module(f"detect_secrets.plugins.{module}"), class_name)()
        except ImportError:
            raise DataError("--scrub-secrets: needs detect-secrets; pip install 'megalm[secrets]'") from None
        patterns = tuple(detector.denylist)
        searches.append(_Search(detector.secret_type, patterns, hints, module in _NEAR_RUNS, module in _MIXED))
    return searches
