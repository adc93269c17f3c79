"""Tables and figures of the paper: of which runs they are made, and how they are written."""
