"""The demo: a chat model learns to refuse, or the paper's whole story on both embedded organisms; with the claims."""

from safelocus.demo.sizes import FULL, QUICK, ChatSizes, OrganismSizes
from safelocus.demo.story import Story, tell

__all__ = ["FULL", "QUICK", "ChatSizes", "OrganismSizes", "Story", "tell"]
