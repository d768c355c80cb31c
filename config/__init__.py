"""Typed configuration: what can be chosen, how a file and flags make one, what is impossible."""
