"""Scores: one number for each eligible weight, from gradients or activations, with their statistics."""
