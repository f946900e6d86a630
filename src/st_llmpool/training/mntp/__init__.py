"""The masked stage: adapt a base to bidirectional attention by masked next-token prediction (MNTP)."""
