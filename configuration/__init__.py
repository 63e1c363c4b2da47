"""Data of the package: model presets that `LLM2SLMConfig` loads, and training recipes that `llm2slm train` takes."""
