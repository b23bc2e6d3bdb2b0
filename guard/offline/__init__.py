"""The device's evaluator over routing that is known already: for tests of policies, and for replay."""
