"""Runs: what a run folder holds, what a result depends on, and how unfinished work is taken up again."""
