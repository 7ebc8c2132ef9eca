"""Evaluations of a model. Each follows a documented protocol and returns its results as plain numbers."""
