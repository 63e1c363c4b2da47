"""Time LLM, SLM and LLM-to-SLM on every engine."""
