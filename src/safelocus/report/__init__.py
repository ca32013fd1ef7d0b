"""What is shown of results: the map of a selection as numbers, terminal tables, figures and a page."""

from safelocus.report.map import MatrixRow, Region, SafetyMap, safety_map

__all__ = ["MatrixRow", "Region", "SafetyMap", "safety_map"]
