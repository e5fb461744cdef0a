"""Scoring on its own: any data set, any model and checkpoint, in one pass over the rows and one over their measures."""
