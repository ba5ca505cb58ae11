"""guidance: the step of one distribution, steered by a second one."""
