"""Faults in a real stack, row after row of the catalogue, and a table of what came of them."""
