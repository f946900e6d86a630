"""Layer summaries on disk: train and evaluate poolings on a frozen backbone that reads each text once."""

from .cached_backbone import cached_summaries, identity_of
from .store import SummaryStore

__all__ = ["SummaryStore", "cached_summaries", "identity_of"]
