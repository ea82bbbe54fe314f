"""The verbs, and all that one run does: from settings to a result."""
