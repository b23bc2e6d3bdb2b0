"""Whether a topic is easier to take out of an MoE than out of a dense model. See `__main__`."""
