"""programs: passes that are recorded or compiled once, and replayed."""
