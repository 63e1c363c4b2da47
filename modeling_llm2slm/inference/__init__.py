"""Text in, text out: loading any checkpoint, batching, files of prompts, sampling settings."""
