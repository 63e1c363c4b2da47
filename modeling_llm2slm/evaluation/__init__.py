"""Metrics, and agreement with the LLM."""
