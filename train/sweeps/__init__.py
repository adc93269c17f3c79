"""Tables and figures of the paper: the runs behind them, and how they are written."""
