"""MoE Guard for vLLM: a general plugin, no fork. See `plugin.register`."""
