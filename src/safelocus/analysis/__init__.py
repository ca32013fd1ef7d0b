"""What results say, as plain numbers and words: where a selection lies, patterns, claims."""

from safelocus.analysis.map import MatrixRow, Region, SafetyMap, safety_map

__all__ = ["MatrixRow", "Region", "SafetyMap", "safety_map"]
