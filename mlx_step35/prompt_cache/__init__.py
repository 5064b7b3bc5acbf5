"""Saved states of token prefixes: an index over token ids, a store in memory, a tier on disk."""
