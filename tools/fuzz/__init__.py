"""Fuzzes what reads untrusted input, a while each; docs/fuzzing.md says what is asserted.

python -m tools.fuzz                          # all, ten minutes each
python -m tools.fuzz trace admin --seconds 60
"""
