"""analysis: what the records of a run, or the steps of one sample, say."""
