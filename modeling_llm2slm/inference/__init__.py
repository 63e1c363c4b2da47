"""Text in, text out: loading any checkpoint, batching and files of prompts."""
