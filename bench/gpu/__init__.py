"""`python -m bench gpu`: everything worth measuring on a GPU, in the time there is."""
