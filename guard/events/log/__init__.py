"""The decision log: a file of lines, each in a chain with the one before it."""
