"""What an operator writes, loaded: policies as frozen objects, or every fault with its place."""

from guard.policy.fault import Fault, Location, PolicyError
from guard.policy.load import load_policies, load_texts, parse_policies
from guard.policy.model import PolicySet
from guard.policy.texts import PolicyTexts, read_policies

__all__ = [
    "Fault",
    "Location",
    "PolicyError",
    "PolicySet",
    "PolicyTexts",
    "load_policies",
    "load_texts",
    "parse_policies",
    "read_policies",
]
