"""Hidden states of the LLM, computed once: the store, encoding into it, the model without its LLM."""
