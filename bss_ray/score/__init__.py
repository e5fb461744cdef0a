"""Scoring without training: any dataset, model and checkpoint, in a pass over the rows and one over their measures."""
