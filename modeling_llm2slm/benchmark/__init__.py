"""The timing harness and its contestants."""
