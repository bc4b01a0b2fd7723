"""How a process learns which rank it is, finds its peers, and writes its log. Importing this needs no torch."""

from megalm.launch.discovery import RankInfo, discover

__all__ = ["RankInfo", "discover"]
