"""Masked routing and tap of a layer on a GPU."""
