"""The losses that a recipe can name, with their settings."""
