"""Gradients and states, measured: through time, during training, in few bits, in a memory that fills up."""
