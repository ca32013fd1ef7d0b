"""Enhance (SET): train only the selected weights, so that an unsafe model refuses and stays as useful as it was.

`enhancing` has the verb, `enhancement` its result, `optimizer` what it is done with: an ordinary torch optimizer for
loops of your own. Nothing is imported here, for the optimizer needs none of the trainer's libraries.
"""
