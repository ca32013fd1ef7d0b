"""Selections: which weights are the top ones, and the one place where they touch a model."""
