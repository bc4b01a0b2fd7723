"""What is done to each document before it is tokenised: what is cut out of it, and which documents do not stay."""

from __future__ import annotations

from megalm.data.prepare.clean.pipeline import Cleaned, Cleaner, Cleaning
from megalm.data.prepare.clean.quality import QUALITY

__all__ = ["QUALITY", "Cleaned", "Cleaner", "Cleaning"]
