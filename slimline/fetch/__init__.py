"""Bring a model in from outside, after it was checked to hold nothing that runs."""
