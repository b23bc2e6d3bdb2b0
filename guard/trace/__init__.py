"""Recorded routing: which experts each request's tokens were routed to; token ids only on demand."""
