"""How balanced is each row? Criteria of a batch, and scores over all rows: pure functions without state."""
