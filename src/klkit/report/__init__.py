"""The run folder, its plots and its page: read records, compute nothing new."""
