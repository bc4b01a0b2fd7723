"""Forms of access tokens, as the services document them: what detect-secrets does not know, or knows in part."""

from __future__ import annotations

FORMS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Hugging Face Token", r"(?:hf_[A-Za-z0-9]{30,}|api_org_[A-Za-z0-9]{30,})", ("hf_", "api_org_")),
    ("Anthropic API Key", r"sk-ant-[A-Za-z0-9_-]{20,}", ("sk-ant-",)),
    ("OpenAI Token", r"sk-(?:proj|svcacct|admin|None)-[A-Za-z0-9_-]{20,}|sk-[A-Za-z0-9]{48,}", ("sk-",)),
    ("Google API Key", r"AIza[A-Za-z0-9_-]{35}", ("AIza",)),
    ("Google OAuth Secret", r"GOCSPX-[A-Za-z0-9_-]{20,}", ("GOCSPX-",)),
    ("Google OAuth Token", r"(?:ya29\.[A-Za-z0-9_.-]{24,}|1//0[A-Za-z0-9_-]{30,})", ("ya29.", "1//0")),
    ("GitHub Token", r"(?:github_pat_[A-Za-z0-9_]{22,255}|gh[pousr]_[A-Za-z0-9_]{36,255})", ("github_pat_", "gh")),
    ("GitLab Token", r"gl(?:pat|dt|ft|soat|rt|rtr|cbt|imt|ptt|oas|agent)-[A-Za-z0-9_.-]{20,}", ("gl",)),
    (
        "AWS Secret Key",
        r"(?i:aws[A-Za-z0-9_ .-]{0,20}(?:secret|key)[A-Za-z0-9_ .-]{0,20}[\"']?\s*[=:]\s*[\"']?)"
        r"[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+])",
        ("aws",),
    ),
    ("AWS Session Token", r"(?i:aws_?session_?token[\"']?\s*[=:]\s*[\"']?)[A-Za-z0-9/+=]{80,}", ("aws",)),
    (
        "Azure Shared Access Signature",
        r"(?:sig=[A-Za-z0-9%+/]{40,}(?:%3[Dd]|=){0,2}|SharedAccessKey=[A-Za-z0-9+/]{43}=)",
        ("sig=", "SharedAccessKey="),
    ),
    ("Slack Token", r"(?:xox[a-z](?:\.xox[a-z])?-[A-Za-z0-9-]{10,}|xapp-\d-[A-Za-z0-9-]{20,})", ("xox", "xapp-")),
    (
        "Slack Webhook",
        r"https://hooks\.slack\.com/(?:services|workflows|triggers)/[A-Za-z0-9_/-]{20,}",
        ("hooks.slack",),
    ),
    (
        "Stripe Access Key",
        r"(?:[srp]k_(?:live|test)_[A-Za-z0-9]{16,}|whsec_[A-Za-z0-9+/=]{24,})",
        ("k_live_", "k_test_", "whsec_"),
    ),
    ("NPM tokens", r"npm_[A-Za-z0-9]{30,}|_authToken=\s*[A-Fa-f0-9-]{36}", ("npm_", "_authToken=")),
    ("PyPI Token", r"pypi-[A-Za-z0-9_-]{60,}", ("pypi-",)),
    (
        "JSON Web Token",
        r"eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}(?:\.[A-Za-z0-9_-]*){1,3}",
        ("eyJ",),
    ),
    ("Discord Bot Token", r"[MNO][A-Za-z0-9_-]{23,27}\.[A-Za-z0-9_-]{6}\.[A-Za-z0-9_-]{27,}", (".",)),
    (
        "Discord Webhook",
        r"https://(?:\w+\.)?discord(?:app)?\.com/api/webhooks/\d{5,}/[A-Za-z0-9_-]{20,}",
        ("/api/webhooks/",),
    ),
    ("Twilio API Key", r"(?:AC|SK)[0-9a-f]{32}(?![0-9a-f])", ("AC", "SK")),
    ("Telegram Bot Token", r"\d{8,10}:[A-Za-z0-9_-]{35}(?![A-Za-z0-9_-])", (":",)),
    ("Mailgun API Key", r"key-[0-9a-f]{32}(?![0-9a-f])", ("key-",)),
    ("DigitalOcean Token", r"do[opr]_v1_[a-f0-9]{40,}", ("_v1_",)),
    ("Databricks Token", r"dapi[a-f0-9]{32}(?:-\d+)?", ("dapi",)),
    ("Docker Token", r"dckr_(?:pat|oat)_[A-Za-z0-9_-]{20,}", ("dckr_",)),
    ("Shopify Token", r"shp(?:at|ca|pa|ss)_[A-Fa-f0-9]{32}", ("shp",)),
    ("Square OAuth Secret", r"(?:sq0(?:csp|atp|idp)-[A-Za-z0-9_-]{22,}|EAAA[A-Za-z0-9_-]{60})", ("sq0", "EAAA")),
    (
        "HashiCorp Token",
        r"(?:hv[sbr]\.[A-Za-z0-9_-]{24,}|[A-Za-z0-9]{14}\.atlasv1\.[A-Za-z0-9_-]{60,})",
        ("hv", ".atlasv1."),
    ),
    ("Atlassian Token", r"AT(?:ATT|CTT)3[A-Za-z0-9_=-]{60,}", ("ATATT3", "ATCTT3")),
    ("Grafana Token", r"(?:glsa_[A-Za-z0-9]{32}_[A-Fa-f0-9]{8}|glc_[A-Za-z0-9+/]{32,}={0,2})", ("glsa_", "glc_")),
    ("Sentry Token", r"sntry[su]_[A-Za-z0-9+/=_-]{40,}", ("sntry",)),
    ("New Relic Key", r"NRAK-[A-Z0-9]{27}", ("NRAK-",)),
    ("Postman Key", r"PMAK-[a-f0-9]{24}-[a-f0-9]{34}", ("PMAK-",)),
    ("RubyGems Token", r"rubygems_[a-f0-9]{48}", ("rubygems_",)),
    ("Linear Key", r"lin_(?:api|oauth)_[A-Za-z0-9]{32,}", ("lin_",)),
    ("Notion Token", r"(?:ntn_[A-Za-z0-9]{40,}|secret_[A-Za-z0-9]{43})", ("ntn_", "secret_")),
    ("Groq Key", r"gsk_[A-Za-z0-9]{40,}", ("gsk_",)),
    ("xAI Key", r"xai-[A-Za-z0-9]{40,}", ("xai-",)),
    ("Perplexity Key", r"pplx-[A-Za-z0-9]{40,}", ("pplx-",)),
    ("Replicate Token", r"r8_[A-Za-z0-9]{30,}", ("r8_",)),
    ("Supabase Token", r"sb(?:p_[a-f0-9]{40}|_secret_[A-Za-z0-9_-]{20,})", ("sbp_", "sb_secret_")),
    (
        "Weights & Biases Key",
        r"(?:wandb_v1_[A-Za-z0-9_]{40,}|(?i:wandb_?api_?key[\"']?\s*[=:]\s*[\"']?)[a-f0-9]{40})",
        ("wandb",),
    ),
    ("age Secret Key", r"AGE-SECRET-KEY-1[0-9A-Z]{58}", ("AGE-SECRET-KEY-1",)),
)
"""(kind, expression, texts of which one occurs); a form begins where no letter, digit, _ or - is before."""
NEAR_RUNS = frozenset(
    ("Discord Bot Token", "GitHub Token", "HashiCorp Token", "Shopify Token", "Telegram Bot Token", "Twilio API Key")
)
"""Kinds whose hints most texts hold, and which are, or have beside them, 24 letters and digits in a row."""
