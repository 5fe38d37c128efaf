"""Measurements of trained models: retrieval over distance, bits per byte."""
