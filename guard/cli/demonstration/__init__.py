"""The demonstration behind `moe-guard demo`: a small trained MoE, policies for it, prompts."""
