"""`python -m bench gpu`: all that is worth measuring on a GPU, in the time there is."""
