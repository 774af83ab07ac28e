"""Studies: a question as data, arms of equal cost, trials that any number of workers share, and a report."""
