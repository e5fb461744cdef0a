"""How balanced is each row? Criteria per batch, and scores over all rows: pure, no state."""
