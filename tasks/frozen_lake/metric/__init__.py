"""The `evaluate` metric of FrozenLake plans."""
