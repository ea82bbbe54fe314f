"""Bridges to other libraries, each of which is imported only when its module's functions are called."""
