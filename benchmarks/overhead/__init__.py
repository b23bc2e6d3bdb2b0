"""What the guard costs: engines side by side that take turns. See `__main__`."""
