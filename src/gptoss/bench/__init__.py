"""How fast a model runs, and what share of the machine that is. Measures; judges no numbers."""
