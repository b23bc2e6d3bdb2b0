"""What an operator writes, loaded: policies as frozen objects, or every fault with its place."""

from guard.policy.fault import Fault, Location, PolicyError
from guard.policy.load import load_policies, parse_policies
from guard.policy.model import PolicySet

__all__ = ["Fault", "Location", "PolicyError", "PolicySet", "load_policies", "parse_policies"]
