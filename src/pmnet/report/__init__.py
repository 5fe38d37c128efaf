"""Results as files: provenance, plots."""
