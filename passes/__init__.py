"""The graph transformation: pure matching, then one small rewriting pass after the other (`pipeline`)."""
