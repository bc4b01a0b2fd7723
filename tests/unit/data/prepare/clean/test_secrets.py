"""--scrub-secrets: one secret of each kind, made up here and put together when the test runs, and none of it stays."""

from __future__ import annotations

import builtins
import json
import random
import string
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megalm.data.prepare.clean import Cleaning
from megalm.data.prepare.clean.secrets import PLACEHOLDER, Secrets
from megalm.data.prepare.corpora import CorpusOptions
from megalm.data.prepare.executors import Workers
from megalm.data.prepare.recipe import Recipe
from megalm.data.prepare.run import prepare
from megalm.data.shards.read import TokenShards
from megalm.data.tokenization.tokenizer import Tokenizer
from megalm.errors import DataError

pytest.importorskip("detect_secrets")

DIGITS, HEX = string.digits, "0123456789abcdef"
LOWER, UPPER = string.ascii_lowercase + DIGITS, string.ascii_uppercase + DIGITS
WORD = string.ascii_letters + DIGITS
_draw = random.Random(7)


def run(count: int, of: str = WORD) -> str:
    return "".join(_draw.choice(of) for _ in range(count))


def joined(*parts: str) -> str:
    """Put together here, so that no scanner of source takes these lines for secrets."""
    return "".join(parts)


def pem(what: str, body: str) -> str:
    return f"{'-' * 5}BEGIN {what}{'-' * 5}\n{body}\n{'-' * 5}END {what}{'-' * 5}"


BODY = "\n".join(run(64) for _ in range(12))
SECRETS = {
    "private key": [
        pem("RSA PRIVATE " + "KEY", BODY),
        pem("PRIVATE " + "KEY", BODY),
        pem("ENCRYPTED PRIVATE " + "KEY", BODY),
        pem("OPENSSH PRIVATE " + "KEY", BODY),
        pem("PGP PRIVATE " + "KEY BLOCK", f"Version: x\nComment: a test\n\n{BODY}\n=ab12"),
        pem("EC PRIVATE " + "KEY", f"Proc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,{run(32, HEX)}\n\n{BODY}"),
        pem("RSA PRIVATE " + "KEY", BODY).replace("\n", "\\n"),  # as in a JSON string
        pem("RSA PRIVATE " + "KEY", BODY).replace("\n", "\n    > "),
        joined("PuTTY-User-Key-", "File-2: ssh-rsa\nEncryption: none\n", BODY, "\nPrivate-MAC: ", run(40, HEX)),
    ],
    "AWS Access Key": [joined("AKIA", run(16, UPPER)), joined("ASIA", run(16, UPPER))],
    "AWS Secret Key": [
        joined("aws_secret_access_", "key = ", run(40)),
        joined("AWS_SECRET_ACCESS_", 'KEY="', run(40), '"'),
    ],
    "AWS Session Token": [joined("aws_session_", "token=", run(200))],
    "GitHub Token": [
        joined("ghp", "_", run(36)),
        joined("github", "_pat_", run(22), "_", run(59)),
        joined("gho_", run(40)),
    ],
    "GitLab Token": [joined("glpat", "-", run(20)), joined("glrt-", run(20)), joined("glptt-", run(40))],
    "Slack Token": [
        joined("xox", "b-", run(12, DIGITS), "-", run(12, DIGITS), "-", run(24)),
        joined("xapp", "-1-", run(30)),
    ],
    "Slack Webhook": [
        joined("https://hooks.", "slack.com/services/T", run(8, UPPER), "/B", run(8, UPPER), "/", run(24))
    ],
    "Stripe Access Key": [
        joined("sk", "_live_", run(24)),
        joined("rk_", "live_", run(99)),
        joined("whsec", "_", run(32)),
    ],
    "Twilio API Key": [joined("AC", run(32, HEX)), joined("SK", run(32, HEX))],
    "SendGrid API Key": [joined("SG", ".", run(22), ".", run(43))],
    "NPM tokens": [joined("npm", "_", run(36)), joined("//registry.example/:_auth", "Token=", "npm", "_", run(36))],
    "PyPI Token": [joined("pypi-", "AgEIcHlwaS5vcmc", run(80)), joined("pypi-", run(120))],
    "Discord Bot Token": [
        joined("M", run(23), ".", run(6), ".", run(27)),
        joined("N", run(25), ".", run(6), ".", run(38)),
    ],
    "Discord Webhook": [joined("https://discord.com/api/", "webhooks/", run(18, DIGITS), "/", run(68))],
    "JSON Web Token": [joined("eyJ", "hbGciOiJIUzI1NiJ9.", "eyJ", "zdWIiOiIxIn0.", run(43))],
    "Azure Storage Account access key": [joined("AccountKey", "=", run(86), "==")],
    "Azure Shared Access Signature": [joined("https://a.example/b?sv=1&", "sig=", run(43), "%3D")],
    "OpenAI Token": [
        joined("sk-", "proj-", run(60)),
        joined("sk-", run(20), "T3Blbk", "FJ", run(20)),
        joined("sk-", run(48)),
    ],
    "Hugging Face Token": [joined("hf", "_", run(34)), joined("api_org", "_", run(34))],
    "Anthropic API Key": [joined("sk-ant-", "api03-", run(93), "AA")],
    "Google API Key": [joined("AIza", run(35))],
    "Google OAuth Secret": [joined("GOCSPX", "-", run(28))],
    "Google OAuth Token": [joined("ya29", ".", "a0", run(120)), joined("1//0", "g", run(60))],
    "Mailchimp Access Key": [joined(run(32, HEX), "-us12")],
    "Mailgun API Key": [joined("key", "-", run(32, HEX))],
    "Square OAuth Secret": [joined("sq0csp", "-", run(43))],
    "Telegram Bot Token": [joined(run(9, "123456789"), ":", "AA", run(33))],
    "Basic Auth Credentials": [joined("postgres", "://", "user:", run(12), "@")],
    "Artifactory Credentials": [joined("AKC", run(60))],
    "DigitalOcean Token": [joined("dop", "_v1_", run(64, HEX))],
    "Databricks Token": [joined("dapi", run(32, HEX))],
    "Docker Token": [joined("dckr", "_pat_", run(27))],
    "Shopify Token": [joined("shpat", "_", run(32, HEX))],
    "HashiCorp Token": [joined("hvs", ".", run(90)), joined(run(14), ".atlasv1.", run(67))],
    "Atlassian Token": [joined("ATATT3", run(180))],
    "Grafana Token": [joined("glsa", "_", run(32), "_", run(8, HEX))],
    "Notion Token": [joined("ntn", "_", run(46))],
    "Groq Key": [joined("gsk", "_", run(52))],
    "xAI Key": [joined("xai", "-", run(80))],
    "Replicate Token": [joined("r8", "_", run(37))],
    "Supabase Token": [joined("sbp", "_", run(40, HEX))],
    "Weights & Biases Key": [joined("WANDB_API_", "KEY=", run(40, HEX))],
    "age Secret Key": [joined("AGE-SECRET-", "KEY-1", run(58, UPPER))],
}
ALL = [(kind, secret) for kind, secrets in SECRETS.items() for secret in secrets]


@pytest.fixture(scope="module")
def secrets() -> Secrets:
    return Secrets()


@pytest.mark.parametrize("around", ["The value is {} and more.", '{{"value": "{}"}}', "a={}\nb=2", "{}"])
def test_the_whole_of_each_kind_goes_and_all_else_stays(secrets: Secrets, around: str) -> None:
    before, after = around.format("\0").split("\0")
    for kind, secret in ALL:
        notes: Counter[str] = Counter()
        scrubbed = secrets.scrub(around.format(secret), notes)
        assert sum(notes.values()) == 1, (kind, secret, notes)
        assert PLACEHOLDER in scrubbed, kind
        assert scrubbed.startswith(before), kind
        assert scrubbed.endswith(after), kind
        pieces = [secret[i : i + 12] for i in range(len(secret) - 12) if _is_key(secret, i)]
        assert not [piece for piece in pieces if piece in scrubbed], kind


def _is_key(secret: str, start: int) -> bool:
    """Whether twelve characters are of the secret itself, and not of the address or the name before it."""
    part = secret[start : start + 12]
    return part.isalnum() and any(c.isdigit() for c in part) and any(c.isalpha() for c in part)


def test_kinds_are_counted_by_their_names(secrets: Secrets) -> None:
    for kind, secret in ALL:
        notes: Counter[str] = Counter()
        secrets.scrub(f"x {secret} x", notes)
        assert notes == {f"secret: {kind}": 1}, secret


def test_none_is_in_the_shards(tmp_path: Path) -> None:
    rows = [{"text": f"Document {i} says: {secret} and that is all.\n"} for i, (_, secret) in enumerate(ALL)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = Recipe(
        corpus="jsonl",
        options=CorpusOptions((str(tmp_path / "a.jsonl"),)),
        cleaning=Cleaning(scrub_secrets=True),
        tokenizer_vocab=300,
        val_fraction=0.1,
        chunk_tokens=64,
    )
    progress = lambda *_: None  # noqa: E731
    summary = prepare(
        recipe, tmp_path / "d", workers=Workers(None, 1), overwrite=False, progress=progress, command="test"
    )
    assert summary.documents == len(ALL)
    assert summary.notes == {f"secret: {kind}": len(secrets) for kind, secrets in SECRETS.items()}
    tokenizer = Tokenizer.load(tmp_path / "d" / "tokenizer.json")
    text = ""
    for split in ("train", "val"):
        shards = TokenShards(tmp_path / "d" / split, 1)
        rows = np.empty((len(shards), 2), dtype=np.int64)
        shards.read(np.arange(len(shards)), rows, None)
        text += tokenizer.decode([int(rows[0, 0]), *rows[:, 1].tolist()])
    assert text.count(PLACEHOLDER) == len(ALL)
    for kind, secret in ALL:
        pieces = [secret[i : i + 12] for i in range(len(secret) - 12) if _is_key(secret, i)]
        assert not [piece for piece in pieces if piece in text], kind
        assert secret not in text
    card = (tmp_path / "d" / "data_card.md").read_text()
    assert f"| secret: Hugging Face Token | {len(SECRETS['Hugging Face Token'])} |" in card


def test_a_key_without_its_end_goes_as_far_as_it_is_one(secrets: Secrets) -> None:
    key = pem("RSA PRIVATE " + "KEY", BODY).rpartition("\n")[0]
    notes: Counter[str] = Counter()
    assert secrets.scrub(f"before\n{key}", notes) == f"before\n{PLACEHOLDER}"
    scrubbed = secrets.scrub(f"before\n{key}\n\nAfter it comes prose, which stays as it is.", notes)
    assert scrubbed.startswith(f"before\n{PLACEHOLDER}")
    assert scrubbed.endswith("comes prose, which stays as it is.")
    assert run(4) not in scrubbed
    two = pem("PRIVATE " + "KEY", BODY)
    assert secrets.scrub(f"{two}\nbetween them\n{two}", notes) == f"{PLACEHOLDER}\nbetween them\n{PLACEHOLDER}"


def test_public_things_and_prose_stay(secrets: Secrets) -> None:
    text = "\n".join(
        [
            pem("CERTIFICATE", BODY),
            pem("PUBLIC KEY", BODY),
            "ssh-rsa " + run(200),
            "sha256:" + run(64, HEX),
            "commit " + run(40, HEX),
            "https://example.com:8080/path?a=1#b",
            "The task-force asked; risk-averse desk-bound staff said sk-8 and hf_hub_download(repo_id) work.",
            "def get_token(self, key: str, password_hash: bytes) -> AccountKey: ...",
            "550e8400-e29b-41d4-a716-446655440000",
            "eyJ is how such tokens begin, AKIA how such keys do, and ghp_ and glpat- how others do.",
        ]
    )
    notes: Counter[str] = Counter()
    assert secrets.scrub(text, notes) == text
    assert not notes


def test_false_hits_are_few_and_the_search_is_fast(secrets: Secrets) -> None:
    folder = Path(json.__file__).parents[1]
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.glob("*.py"))[:120]]
    notes: Counter[str] = Counter()
    started = time.process_time()
    for text in texts:
        secrets.scrub(text, notes)
    megabytes = sum(map(len, texts)) / 1e6
    assert sum(notes.values()) <= 2 * megabytes, notes
    assert megabytes / (time.process_time() - started) > 0.5  # tens of MB/s on a quiet machine


def test_without_the_library_one_line_says_what_to_install(monkeypatch) -> None:
    for name in [name for name in sys.modules if name.startswith("detect_secrets")]:
        monkeypatch.delitem(sys.modules, name)
    real = builtins.__import__

    def absent(name: str, *arguments, **settings):
        if name.startswith("detect_secrets"):
            raise ImportError(name)
        return real(name, *arguments, **settings)

    monkeypatch.setattr(builtins, "__import__", absent)
    monkeypatch.setattr("megalm.data.prepare.clean.secrets.import_module", absent)
    with pytest.raises(DataError, match=r"--scrub-secrets: needs detect-secrets; pip install 'megalm\[secrets\]'"):
        Secrets()
