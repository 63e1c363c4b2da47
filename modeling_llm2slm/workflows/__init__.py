"""Several steps in one command: plan and speedup."""
