"""Training a generator of weights, and generating with it."""
