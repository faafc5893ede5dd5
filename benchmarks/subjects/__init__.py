"""Inputs: models with random weights and their data, scores, and parameters that are partly trained."""
