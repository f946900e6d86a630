"""Export, check and publish models, and load what is published."""
