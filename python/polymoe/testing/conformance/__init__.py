"""What every op must do, whatever computes it: one file per op with its cases, its float64 truth and its check.

A check takes a case, a target and a seed, and raises AssertionError if the target's backend is wrong.
"""
