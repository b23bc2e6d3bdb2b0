"""The demo: a small, really trained MoE, its prompts and its policies."""
