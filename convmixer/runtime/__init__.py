"""A trained model in the form in which this machine computes it fastest, or in files for other programs."""
