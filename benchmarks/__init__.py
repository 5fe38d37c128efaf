"""Measurements of speed and memory against the published formulation and models of equal size; see `pmnet bench`."""
