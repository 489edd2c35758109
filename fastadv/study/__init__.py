"""Studies: the same training in many cells, of data sets, models, methods, attacks, budgets and seeds."""
