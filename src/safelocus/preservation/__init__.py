"""Preserve (SPA): keep the selected weights while everything else is fine-tuned.

`attachment` has the verb, `protection` what it gives; `run` the whole run, `result` what that finds, `trainee` what
learns the task in it. Nothing is imported here: what a run found is read without the trainer's libraries.
"""
