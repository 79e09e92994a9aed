"""What is measured of a generator of edited images on pairs: paired values, and distances between the two sets."""
