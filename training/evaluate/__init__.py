"""Evaluations of a model. Each follows a documented protocol and returns its figures as plain numbers."""
