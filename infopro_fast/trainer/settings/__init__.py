"""Settings of a training and the rows of the paper; importing this needs no torch."""
