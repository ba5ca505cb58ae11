"""grammars: only texts of a language."""
