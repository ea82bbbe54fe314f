"""Numbers in, intervals out: error bars, tails, lower bounds and planning, in NumPy alone."""
