"""lm_eval: an Engine as a model of lm-evaluation-harness."""
