"""What a model holds and costs: its layers, probes of them, operations, time and memory."""
