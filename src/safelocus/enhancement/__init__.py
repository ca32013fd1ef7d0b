"""Enhance (SET): train only the selected weights, so that an unsafe model refuses and stays as useful as it was.

`run` has the verb, `result` what it finds, `trainee` what is trained, `optimizer` what that is done with: an ordinary
torch optimizer for loops of your own. Nothing is imported here, for the optimizer needs no trainer's libraries.
"""
