"""Settings of a training and the rows of the paper's tables. Importing this needs no torch."""
