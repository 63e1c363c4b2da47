"""The HTTP server and its scheduler."""
