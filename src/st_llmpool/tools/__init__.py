"""What helps before and after a training run: choose rows, find a batch size, average models."""
