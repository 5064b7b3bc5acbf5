"""The HTTP side of the server: from a request's bytes to a request for the engine, and back."""
