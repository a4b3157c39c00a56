"""Scores of answers: metrics, their intervals, and the process that computes them."""
