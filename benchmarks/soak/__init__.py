"""A guarded server under a mixed load, reloads, operators' changes and faults, for half an hour."""
