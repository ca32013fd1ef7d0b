"""The demo: the paper's whole story on both embedded organisms, and each of its claims beside what was measured."""

from safelocus.demo.sizes import FULL, QUICK, Sizes
from safelocus.demo.story import Story, tell

__all__ = ["FULL", "QUICK", "Sizes", "Story", "tell"]
