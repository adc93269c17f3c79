"""`python -m bench gpu`: measures everything worth measuring on a GPU within a time limit."""
