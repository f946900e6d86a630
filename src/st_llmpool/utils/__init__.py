"""Helpers that every part of the package shares."""
