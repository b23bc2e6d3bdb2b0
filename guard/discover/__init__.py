"""Offline: which experts go with a behaviour, how surely, and what a threshold on them costs."""
