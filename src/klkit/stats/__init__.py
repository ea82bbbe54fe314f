"""Numbers in, intervals out: error bars, tails, stopping and planning, in NumPy alone."""
