"""Analysis of a model: its layers and probes of them, and its cost in operations, time and memory."""
