"""Suites beside policies: read, turned into routing, evaluated, and compared with what they expect."""
