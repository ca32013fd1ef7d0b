"""Preserve (SPA): keep the selected weights while everything else is fine-tuned.

`attachment` has the verb, `protection` what it gives, `held` what that holds; `run` the whole run, `result` what it
finds, `trainee` what learns the task in it. Nothing is imported here: results are read without the trainer's libraries.
"""
