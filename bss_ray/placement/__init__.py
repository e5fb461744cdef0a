"""Which process of a run goes to which node, and whether all of them fit."""
