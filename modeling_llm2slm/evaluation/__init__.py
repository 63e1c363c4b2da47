"""Evaluation: metrics, agreement with the LLM, and the timing harness."""
