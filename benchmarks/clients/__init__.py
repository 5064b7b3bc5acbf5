"""Real coding agents against the server."""
