"""Recorded routing: which experts each token of each request was routed to, and nothing of its text."""
