"""Which process measures the rows, and when: settings, engines, scorers and their pool."""
